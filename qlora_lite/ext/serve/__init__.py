"""An OpenAI-compatible server to try adapters with existing clients; vLLM and Ollama are for production.

`transformers serve` (read and tried at 5.24) is no replacement for it. Seconds are equal: with a tiny model on two CPU
cores either has answered 7 s after its start, in 421 MiB here and 446 MiB there. But it answers 500 for an adapter's
folder, which has no config.json: each run would have to be merged first, and be a whole model in memory. Here all runs
share one 4-bit base, found where the run has it (also `package:` models) and capped at the memory there is: weights
that do not fit stay in host memory. Requests that wait and connections are bounded. What it has and this has not:
completions, responses and transcriptions.
"""
