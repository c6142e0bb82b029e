"""An OpenAI-compatible server to try adapters with existing clients; vLLM and Ollama are for production."""
