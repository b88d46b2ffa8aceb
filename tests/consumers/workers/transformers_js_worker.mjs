// Run the bundle with transformers.js under Node, in its own generation loop.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const job = JSON.parse(readFileSync(0, "utf8"));
const require = createRequire(join(process.cwd(), "package.json"));
const entry = require.resolve("@huggingface/transformers");
const { AutoModelForCausalLM, Tensor, env } = await import(pathToFileURL(entry));

env.allowRemoteModels = false;
env.localModelPath = dirname(job.bundle);
const model = await AutoModelForCausalLM.from_pretrained(basename(job.bundle), {
  dtype: "fp32", device: "cpu", use_external_data_format: true,
});

function tensor(rows) {
  const flat = BigInt64Array.from(rows.flat().map(BigInt));
  return new Tensor("int64", flat, [rows.length, rows[0].length]);
}

async function generate(ids, mask) {
  const found = await model.generate({
    inputs: tensor(ids), attention_mask: tensor(mask), do_sample: false,
    max_new_tokens: job.new_tokens, min_new_tokens: job.new_tokens,
  });
  return found.tolist().map((row) => row.slice(ids[0].length).map(Number));
}

const tokens = {};
for (const [name, ids] of Object.entries(job.single)) {
  tokens[name] = await generate([ids], [ids.map(() => 1)]);
}
tokens.left = await generate(job.left.ids, job.left.mask);
console.log(JSON.stringify({ version: env.version, tokens }));
