// The playground: a chat over the server's own API. State is in <body data-state>: loading, locked, ready, busy.

const element = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens"];
const ALTERNATIVES = 5;
let key = sessionStorage.apiKey ?? "";
let model = null;
let messages = [];
let running = null;

function setState(state, status) {
  document.body.dataset.state = state;
  element("send").disabled = state !== "ready";
  element("clear").disabled = state !== "ready";
  element("stop").disabled = state !== "busy";
  element("key_box").hidden = !key && state !== "locked";
  if (status !== undefined) element("status").textContent = status;
}

function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  return fetch(path, { ...options, headers });
}

async function explain(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `status ${answer.status}`;
  }
}

async function load() {
  setState("loading", "Loading …");
  try {
    const answer = await call("v1/models");
    if (answer.status === 401) {
      setState("locked", "This server needs an API key.");
      element("key").focus();
      return;
    }
    if (!answer.ok) throw new Error(await explain(answer));
    model = (await answer.json()).data[0];
    element("model").textContent = model.id;
    document.title = model.id;
    setState("ready", `up to ${model.max_model_len} tokens`);
  } catch (error) {
    setState("locked", `The server cannot be reached: ${error.message}`);
  }
}

function show(kind, text = "") {
  const item = document.createElement("div");
  item.className = `message ${kind}`;
  item.textContent = text;
  element("log").append(item);
  scroll();
  return item;
}

function scroll() {
  element("log").scrollTop = element("log").scrollHeight;
}

function request(text) {
  const body = { model: model.id, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    const value = element(name).value;
    if (value !== "") body[name] = Number(value);
  }
  if (element("stop_text").value) body.stop = element("stop_text").value;
  if (element("mode").value === "text") {
    return ["v1/completions", { ...body, prompt: text, logprobs: ALTERNATIVES }];
  }
  const system = element("system").value.trim();
  const opening = system ? [{ role: "system", content: system }] : [];
  const turns = [...opening, ...messages, { role: "user", content: text }];
  return ["v1/chat/completions", { ...body, messages: turns, logprobs: true, top_logprobs: ALTERNATIVES }];
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// Both endpoints as one: the text of an event, and its tokens as {token, logprob, top: [[text, logprob], ...]}.
function read(choice) {
  const found = choice.logprobs;
  const text = choice.delta ? choice.delta.content ?? "" : choice.text;
  if (!found) return { text, tokens: [] };
  if (found.content) {
    const tokens = found.content.map((each) => ({
      token: each.token,
      logprob: each.logprob,
      top: each.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
    return { text, tokens };
  }
  const tokens = found.tokens.map((token, at) => ({
    token,
    logprob: found.token_logprobs[at],
    top: Object.entries(found.top_logprobs[at] ?? {}).sort((one, other) => other[1] - one[1]),
  }));
  return { text, tokens };
}

function addToken(item, text, token) {
  const piece = document.createElement("span");
  piece.textContent = text;
  if (token) {
    const probability = Math.exp(token.logprob);
    const level = probability > 0.75 ? 1 : probability > 0.4 ? 2 : probability > 0.1 ? 3 : 4;
    piece.className = `token p${level}`;
    piece.tabIndex = 0;
    piece.setAttribute("role", "button");
    piece.addEventListener("click", () => showAlternatives(token));
    piece.addEventListener("keydown", (event) => {
      if (event.key === "Enter") showAlternatives(token);
    });
  }
  item.append(piece);
  scroll();
}

function showAlternatives(token) {
  const rows = token.top.map(([text, logprob]) => {
    const row = document.createElement("tr");
    if (text === token.token) row.className = "chosen";
    for (const content of [JSON.stringify(text).slice(1, -1), `${(100 * Math.exp(logprob)).toFixed(1)} %`]) {
      const cell = document.createElement("td");
      cell.textContent = content;
      row.append(cell);
    }
    return row;
  });
  element("alternatives").tBodies[0].replaceChildren(...rows);
  element("alternatives").hidden = false;
  element("hint").textContent = "The chosen token is bold, unless it was less likely than these.";
}

async function send(text) {
  const [path, body] = request(text);
  show("user", text);
  running = new AbortController();
  setState("busy", "Waiting …");
  const item = show("assistant");
  let answerText = "", tokens = 0, reason = null, usage = null, first = 0;
  try {
    const answer = await call(path, { method: "POST", body: JSON.stringify(body), signal: running.signal });
    if (!answer.ok) throw new Error(await explain(answer));
    for await (const event of events(answer)) {
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        const part = read(choice);
        reason = choice.finish_reason ?? reason;
        answerText += part.text;
        if (part.tokens.length) first ||= performance.now();
        tokens += part.tokens.length;
        if (part.text) addToken(item, part.text, part.tokens[0]);
      }
      const seconds = (performance.now() - first) / 1000;
      if (tokens > 1) setState("busy", `${tokens} tokens, ${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    }
    const seconds = (performance.now() - first) / 1000;
    const speed = tokens > 1 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    note(item, `${usage.prompt_tokens} prompt tokens, ${usage.completion_tokens} new, ended by ${reason}${speed}`);
    setState("ready", `${tokens} tokens${speed}`);
  } catch (error) {
    if (error.name === "AbortError") {
      note(item, "stopped");
      setState("ready", `${tokens} tokens, stopped`);
    } else {
      if (!answerText) item.remove();
      show("failure", error.message);
      setState("ready", "The request failed.");
      return;
    }
  } finally {
    running = null;
  }
  if (element("mode").value === "chat") {
    messages.push({ role: "user", content: text }, { role: "assistant", content: answerText });
  }
}

function note(item, text) {
  const line = document.createElement("small");
  line.className = "note";
  line.textContent = text;
  item.append(line);
  scroll();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.theme = theme;
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (document.body.dataset.state !== "ready") return;
  const text = element("input").value;
  element("input").value = "";
  send(text);
});
element("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    element("form").requestSubmit();
  }
});
element("stop").addEventListener("click", () => running?.abort());
element("clear").addEventListener("click", () => {
  messages = [];
  element("log").replaceChildren();
  element("input").focus();
});
element("show_tokens").addEventListener("change", (event) => {
  element("log").classList.toggle("colored", event.target.checked);
});
element("key_save").addEventListener("click", () => {
  key = sessionStorage.apiKey = element("key").value.trim();
  load();
});
element("key").addEventListener("keydown", (event) => {
  if (event.key === "Enter") element("key_save").click();
});
element("theme").addEventListener("click", () => {
  const isDark = getComputedStyle(document.documentElement).colorScheme === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  setTheme(isDark ? "light" : "dark");
});
if (localStorage.theme) setTheme(localStorage.theme);
load();
