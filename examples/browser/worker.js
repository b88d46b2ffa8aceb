// Loads the model and generates, so that the page stays responsive.
//
// From the page:  {type: "load", library, model, device}
//                 {type: "generate", messages, maxNewTokens, temperature}, {type: "stop"}
// To the page:    {type: "progress", loaded, total}, {type: "ready", device, threads, chats}
//                 {type: "text", text, tokens}, {type: "done", tokens, prompt, reused, firstMs, ms, stopped}
//                 {type: "error", stage, message}
let library, tokenizer, model, stopping;
let cache = null; // keys and values of the tokens in `cached`, kept between turns
let cached = [];

const handlers = { load, generate, stop: () => stopping?.interrupt() };

self.onmessage = async ({ data }) => {
  try {
    await handlers[data.type](data);
  } catch (error) {
    const stage = data.type;
    self.postMessage({ type: "error", stage, message: String(error?.message ?? error) });
  }
};

async function load({ library: url, wasm, model: name, base, device }) {
  library = await import(url);
  const { env } = library;
  env.allowRemoteModels = false; // nothing is sent anywhere
  env.allowLocalModels = true;
  env.localModelPath = base;
  env.useBrowserCache = false; // a new export at the same address must not meet old weights
  if (wasm) env.backends.onnx.wasm.wasmPaths = wasm;
  const threads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency) : 1;
  env.backends.onnx.wasm.numThreads = threads;

  const files = new Map();
  const progress_callback = ({ status, file, loaded = 0, total = 0 }) => {
    if (status !== "progress") return;
    files.set(file, [loaded, total]);
    const sum = (index) => [...files.values()].reduce((all, pair) => all + pair[index], 0);
    self.postMessage({ type: "progress", loaded: sum(0), total: sum(1) });
  };
  const options = { device, progress_callback };
  tokenizer = await library.AutoTokenizer.from_pretrained(name, options);
  model = await library.AutoModelForCausalLM.from_pretrained(name, options);
  yieldBetweenSteps();
  self.postMessage({ type: "ready", device, threads, chats: Boolean(tokenizer.chat_template) });
}

// WebAssembly steps only ever wait for each other, so without a pause no message would arrive until the end.
function yieldBetweenSteps() {
  const { port1, port2 } = new MessageChannel();
  const forward = model.forward.bind(model);
  model.forward = async (inputs) => {
    await new Promise((resolve) => {
      port1.onmessage = resolve;
      port2.postMessage(null);
    });
    return forward(inputs);
  };
}

async function generate({ messages, maxNewTokens, temperature }) {
  const prompt = encode(messages);
  const ids = Array.from(prompt.input_ids.data, Number);
  const isPrefix = cache && cached.length < ids.length && cached.every((id, i) => id === ids[i]);
  if (!isPrefix) await forget();
  const reused = isPrefix ? cached.length : 0;

  stopping = new library.InterruptableStoppingCriteria();
  let tokens = 0;
  let first = null;
  const started = performance.now();
  const streamer = new library.TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    token_callback_function: () => {
      first ??= performance.now();
      tokens += 1;
    },
    callback_function: (text) => self.postMessage({ type: "text", text, tokens }),
  });
  const sampling = temperature > 0
    ? { do_sample: true, temperature, top_k: 64, top_p: 0.95 }
    : { do_sample: false };
  const result = await model.generate({
    ...prompt,
    ...sampling,
    max_new_tokens: maxNewTokens,
    past_key_values: cache ?? undefined,
    return_dict_in_generate: true,
    stopping_criteria: stopping,
    streamer,
  });
  cache = result.past_key_values;
  cached = Array.from(result.sequences.data, Number).slice(0, cache.get_seq_length());
  const end = performance.now();
  self.postMessage({
    type: "done",
    tokens,
    prompt: ids.length,
    reused,
    firstMs: (first ?? end) - started,
    ms: end - (first ?? end),
    stopped: stopping.interrupted,
  });
}

function encode(messages) {
  if (tokenizer.chat_template) {
    return tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
  }
  return tokenizer(messages.map(({ content }) => content).join("")); // a base model continues the text
}

async function forget() {
  await cache?.dispose?.();
  cache = null;
  cached = [];
}
