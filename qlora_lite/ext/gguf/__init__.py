"""Write merged models and adapters as GGUF files, for llama.cpp and Ollama, and read them back."""
