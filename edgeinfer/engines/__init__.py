"""The engines that compute: llama.cpp for GGUF models."""
