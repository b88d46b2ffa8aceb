// The page: settings from the address, the conversation, and the state of the worker.
const VERSION = "4.3.1"; // of transformers.js, as in package.json
const LOCAL = "node_modules/@huggingface/transformers/dist/transformers.min.js";
const CDN = `https://cdn.jsdelivr.net/npm/@huggingface/transformers@${VERSION}/dist/transformers.min.js`;
const LOCAL_WASM = "node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify";

const address = new URL(location.href);
const name = address.searchParams.get("model") ?? "model";
const here = (path) => new URL(path, location.href).href;
const element = (id) => document.getElementById(id);
const [log, form, input, send, stop, status, bar, device, temperature, maximum, reset] = [
  "log", "form", "input", "send", "stop", "status", "bar", "device", "temperature", "maximum", "reset",
].map(element);

let worker = null;
let messages = [];
let answer = null; // the element that the current answer is written to
let chats = true;

function setState(state, text) {
  document.body.dataset.state = state; // loading, ready, generating or failed
  status.textContent = text;
  bar.hidden = state !== "loading";
  send.disabled = input.disabled = state !== "ready";
  send.hidden = state === "generating";
  stop.hidden = state !== "generating";
  device.disabled = state === "loading" || state === "generating";
  reset.disabled = state === "generating";
  if (state === "ready") input.focus();
}

function add(role, text) {
  const item = document.createElement("article");
  item.className = role;
  item.textContent = text;
  log.append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

function fail(message) {
  setState("failed", "Not running.");
  add("failure", message);
}

async function exists(path) {
  try {
    return (await fetch(here(path), { method: "HEAD" })).ok;
  } catch {
    return false;
  }
}

async function load() {
  worker?.terminate();
  setState("loading", "Looking for the model …");
  bar.removeAttribute("value");
  if (location.protocol === "file:") {
    return fail("This page needs a file server. In its folder, run: python3 -m http.server");
  }
  if (!(await exists(`${name}/config.json`))) {
    return fail(
      `There is no model in the folder “${name}” next to this page. Make one, then reload:\n\n` +
        `gemma3-export onnx --size 270m-it --for web -o ${name}`,
    );
  }
  const graph = device.value === "webgpu" ? "model.onnx" : "model_quantized.onnx";
  if (!(await exists(`${name}/onnx/${graph}`))) {
    const dtype = graph === "model.onnx" ? "fp32" : "int8";
    return fail(
      `The folder “${name}” has no onnx/${graph}, which ${device.selectedOptions[0].text} runs. Add it, then reload:\n\n` +
        `gemma3-export onnx --size 270m-it --for web --dtype ${dtype} -o ${name}`,
    );
  }
  const isLocal = await exists(LOCAL);
  worker = new Worker(here("worker.js"), { type: "module" });
  worker.onmessage = ({ data }) => handlers[data.type](data);
  worker.onerror = (event) => fail(`The worker failed: ${event.message ?? "its script cannot be loaded"}`);
  worker.postMessage({
    type: "load",
    library: isLocal ? here(LOCAL) : CDN,
    wasm: isLocal ? { mjs: here(`${LOCAL_WASM}.mjs`), wasm: here(`${LOCAL_WASM}.wasm`) } : null,
    model: name,
    base: new URL("./", location.href).pathname,
    device: device.value,
  });
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(0);

const handlers = {
  progress({ loaded, total }) {
    bar.max = total;
    bar.value = loaded;
    const isDone = total > 0 && loaded >= total;
    setState("loading", isDone ? "Preparing the model …" : `Loading ${megabytes(loaded)} of ${megabytes(total)} MB …`);
    if (isDone) bar.removeAttribute("value");
  },
  ready({ threads, chats: isChat }) {
    chats = isChat;
    input.placeholder = chats ? "Message" : "Text to continue (this model has no chat format)";
    const where = device.value === "webgpu" ? "the GPU" : `${threads} ${threads === 1 ? "thread" : "threads"}`;
    setState("ready", `Ready, on ${where}.`);
  },
  text({ text, tokens }) {
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    answer.append(text);
    if (isAtEnd) log.scrollTop = log.scrollHeight;
    status.textContent = `${tokens} tokens …`;
  },
  done({ tokens, prompt, reused, firstMs, ms, stopped }) {
    messages.push({ role: "assistant", content: answer.textContent });
    answer.classList.remove("writing");
    const read = prompt - reused;
    const parts = [
      `${tokens} tokens`,
      tokens > 1 ? `${(((tokens - 1) * 1000) / ms).toFixed(1)} tokens/s` : "",
      `prompt: ${read} tokens in ${(firstMs / 1000).toFixed(1)} s`,
      stopped ? "stopped" : "",
    ];
    setState("ready", parts.filter(Boolean).join(", "));
  },
  error({ stage, message }) {
    answer?.classList.remove("writing");
    if (stage === "load") {
      return fail(`The model cannot be loaded: ${message}\n\nWithout a network, run “npm install --ignore-scripts” in this folder first.`);
    }
    add("failure", `Generation failed: ${message}`);
    messages = [];
    setState("ready", "The conversation starts over.");
  },
};

function ask() {
  const content = input.value.trim();
  if (!content || send.disabled) return;
  input.value = "";
  if (!chats) messages = []; // each text is continued on its own
  messages.push({ role: "user", content });
  add("user", content);
  answer = add("assistant", "");
  answer.classList.add("writing");
  setState("generating", "Reading the prompt …");
  worker.postMessage({
    type: "generate",
    messages,
    maxNewTokens: Number(maximum.value) || 256,
    temperature: Number(temperature.value),
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
stop.addEventListener("click", () => worker.postMessage({ type: "stop" }));
reset.addEventListener("click", () => {
  messages = [];
  log.replaceChildren();
  input.focus();
});
device.addEventListener("change", load);

async function start() {
  setState("loading", "Starting …");
  const gpu = await navigator.gpu?.requestAdapter().catch(() => null);
  if (!gpu) device.querySelector("[value=webgpu]").disabled = true;
  if (!self.crossOriginIsolated && "serviceWorker" in navigator && !sessionStorage.isolation) {
    sessionStorage.isolation = "requested"; // once: private windows may have no service workers
    try {
      await navigator.serviceWorker.register("isolation.js");
      await navigator.serviceWorker.ready;
      return location.reload();
    } catch {
      // One thread it is.
    }
  }
  await load();
}

start();
