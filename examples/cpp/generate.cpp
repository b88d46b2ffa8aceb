// Generate greedily from a TorchScript archive of gemma3-export, with only libtorch.
//
//   generate model.ts 2,651,6037 --new-tokens 32 --device cpu
//
// The program reads and prints token ids and leaves tokenizing to the caller. Everything it needs to
// know about the model is in the archive, which has `config.json` as an extra file.
//
// Signature of the archive's forward (B batch, T new tokens, S cached and new tokens):
//   input_ids           int64 [B, T]
//   attention_mask      int64 [B, S]   1 for tokens, 0 for padding
//   past                List[Tensor]   key, value, key, value, ... each [B, kv_heads, S - T, head_dim]
//   num_logits_to_keep  int64 [1]      number of last tokens to return logits for; 0 means all
//   -> (logits float32 [B, kept, vocab], key, value, key, value, ... each [B, kv_heads, S, head_dim])

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <torch/script.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <iostream>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Options {
  std::string archive;
  std::vector<int64_t> prompt;
  torch::Device device = torch::kCPU;
  int64_t new_tokens = 32;
  int64_t prefill_chunk = 512;
  int threads = 0;  // 0 lets libtorch choose
};

struct Model {
  torch::jit::Module module;
  torch::Device device = torch::kCPU;
  torch::ScalarType cache_dtype = torch::kFloat32;
  int64_t layers = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_tokens = 0;
  std::vector<int64_t> eos;  // generation ends at any of these
};

using Cache = c10::List<torch::Tensor>;

int64_t whole_number(const std::string& text, const std::string& what) {
  std::size_t used = 0;
  int64_t value = -1;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || used != text.size() || value < 0) {
    throw std::invalid_argument(what + " is '" + text + "'; it must be a whole number");
  }
  return value;
}

std::vector<int64_t> whole_numbers(const std::string& text, const std::string& what) {
  std::vector<int64_t> numbers;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    numbers.push_back(whole_number(part, what));
  }
  return numbers;
}

Options parse_options(int argc, char** argv) {
  Options options;
  std::vector<std::string> positional;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name.rfind("--", 0) != 0) {
      positional.push_back(name);
      continue;
    }
    if (++i == argc) throw std::invalid_argument(name + " needs a value");
    const std::string value = argv[i];
    if (name == "--device") {
      options.device = torch::Device(value);
    } else if (name == "--new-tokens") {
      options.new_tokens = whole_number(value, name);
      if (options.new_tokens == 0) throw std::invalid_argument("--new-tokens must be at least 1");
    } else if (name == "--prefill-chunk") {
      options.prefill_chunk = std::max<int64_t>(1, whole_number(value, name));
    } else if (name == "--threads") {
      options.threads = static_cast<int>(whole_number(value, name));
    } else {
      throw std::invalid_argument("unknown option " + name);
    }
  }
  if (positional.size() != 2) {
    throw std::invalid_argument(
        "usage: generate model.ts ID,ID,... [--device cpu|cuda] [--new-tokens N] "
        "[--prefill-chunk N] [--threads N]");
  }
  options.archive = positional[0];
  options.prompt = whole_numbers(positional[1], "a token id");
  if (options.prompt.empty()) throw std::invalid_argument("the prompt is empty");
  return options;
}

// Return the integers of one key of config.json: `"key": 5` or `"key": [1, 106]`. These keys occur
// once, at the top level, so this does not need a JSON library.
std::vector<int64_t> config_numbers(const std::string& json, const std::string& key) {
  std::smatch found;
  const std::regex pattern("\"" + key + "\"\\s*:\\s*(\\d+|\\[[\\d\\s,]*\\])");
  if (!std::regex_search(json, found, pattern)) {
    throw std::runtime_error("the archive's config.json has no whole number " + key);
  }
  const std::string text = found[1];
  std::vector<int64_t> numbers;
  const std::regex digits("\\d+");
  for (std::sregex_iterator match(text.begin(), text.end(), digits), end; match != end; ++match) {
    numbers.push_back(std::stoll(match->str()));
  }
  return numbers;
}

Model load_model(const std::string& path, torch::Device device) {
  if (device.is_cuda() && !at::hasCUDA()) {
    throw std::runtime_error("--device is cuda, but libtorch finds no GPU; use --device cpu");
  }
  torch::jit::ExtraFilesMap files{{"config.json", ""}};
  Model model;
  model.module = torch::jit::load(path, device, files);
  model.module.eval();
  model.device = device;
  const std::string& config = files["config.json"];
  if (config.empty()) throw std::runtime_error(path + " has no config.json; export it again with gemma3-export");
  model.layers = config_numbers(config, "num_hidden_layers").at(0);
  model.kv_heads = config_numbers(config, "num_key_value_heads").at(0);
  model.head_dim = config_numbers(config, "head_dim").at(0);
  model.vocab_size = config_numbers(config, "vocab_size").at(0);
  model.max_tokens = config_numbers(config, "max_position_embeddings").at(0);
  model.eos = config_numbers(config, "eos_token_id");
  // Norms are parameters of the archive; the cache has their dtype.
  for (const auto& parameter : model.module.parameters()) {
    model.cache_dtype = parameter.scalar_type();
    break;
  }
  return model;
}

Cache empty_cache(const Model& model) {
  const auto options = torch::TensorOptions().dtype(model.cache_dtype).device(model.device);
  Cache cache;
  for (int64_t i = 0; i < 2 * model.layers; ++i) {
    cache.push_back(torch::empty({1, model.kv_heads, 0, model.head_dim}, options));
  }
  return cache;
}

// Append tokens to the cache; return the token that is most likely to follow the last of them.
int64_t step(Model& model, const std::vector<int64_t>& ids, Cache& cache) {
  const auto count = static_cast<int64_t>(ids.size());
  const int64_t cached = cache.get(0).size(2);
  const auto on_device = torch::TensorOptions().dtype(torch::kInt64).device(model.device);
  std::vector<torch::jit::IValue> inputs{
      torch::tensor(ids, torch::kInt64).unsqueeze(0).to(model.device),
      torch::ones({1, cached + count}, on_device),
      cache,
      torch::ones({1}, torch::kInt64),  // logits of the last token only
  };
  const auto output = model.module.forward(std::move(inputs)).toTuple();
  const auto& elements = output->elements();
  for (std::size_t i = 1; i < elements.size(); ++i) {
    cache.set(i - 1, elements[i].toTensor());
  }
  return elements[0].toTensor().select(0, 0).select(0, -1).argmax().item<int64_t>();
}

void check_prompt(const Options& options, const Model& model) {
  for (const int64_t id : options.prompt) {
    if (id >= model.vocab_size) {
      throw std::invalid_argument("token id " + std::to_string(id) + " is outside the vocabulary of " +
                                  std::to_string(model.vocab_size));
    }
  }
  // The last new token is not fed back.
  const int64_t fed = static_cast<int64_t>(options.prompt.size()) + options.new_tokens - 1;
  if (fed > model.max_tokens) {
    throw std::invalid_argument("prompt and new tokens need a context of " + std::to_string(fed) +
                                " tokens; this model has " + std::to_string(model.max_tokens));
  }
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void generate(const Options& options, Model& model) {
  Cache cache = empty_cache(model);
  int64_t token = 0;
  const auto begun = std::chrono::steady_clock::now();
  const auto& prompt = options.prompt;
  for (std::size_t at = 0; at < prompt.size(); at += options.prefill_chunk) {
    const auto stop = std::min(prompt.size(), at + static_cast<std::size_t>(options.prefill_chunk));
    token = step(model, {prompt.begin() + at, prompt.begin() + stop}, cache);
  }
  const double prefill = seconds_since(begun);
  const auto prefilled = std::chrono::steady_clock::now();
  int64_t printed = 0;
  while (printed < options.new_tokens) {
    std::cout << (printed ? "," : "") << token << std::flush;
    ++printed;
    if (std::find(model.eos.begin(), model.eos.end(), token) != model.eos.end()) break;
    if (printed < options.new_tokens) token = step(model, {token}, cache);
  }
  std::cout << std::endl;
  const double decode = seconds_since(prefilled);
  std::cerr << "prefill " << prompt.size() << " tokens, " << prompt.size() / prefill << " tok/s\n";
  if (printed > 1) {
    std::cerr << "decode " << printed - 1 << " tokens, " << (printed - 1) / decode << " tok/s\n";
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse_options(argc, argv);
    if (options.threads > 0) at::set_num_threads(options.threads);
    const c10::InferenceMode inference;
    // Specializing the graph would make logits depend on earlier runs, and is slow on CPUs.
    torch::jit::setGraphExecutorOptimize(false);
    Model model = load_model(options.archive, options.device);
    check_prompt(options, model);
    generate(options, model);
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::invalid_argument& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
