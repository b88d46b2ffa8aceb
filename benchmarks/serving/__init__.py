"""Load our server and llama-server with the same clients, and compare what they achieve.

    python -m benchmarks.serving DIR --llama .cache/peers/llama-server     both, in turns
    python -m benchmarks.serving DIR --clients 8 --prompt-tokens 128       ours alone
    python -m benchmarks.serving.llama_server WEIGHTS.gguf                 build llama-server first
    make bench-serve                                                       all of it, real 270M

N clients form a closed loop: each sends its next request as soon as its last answer is complete.
Prompts are token ids, cut from text at random places, so that no two share a prefix. Both servers
decode greedily, ignore the end of a text (``ignore_eos``), and so generate exactly as many tokens
as they are asked for. While one server is measured, the other is stopped by a signal.
"""
