"""Exporters: checkpoints and ONNX files into what the runtime likes best, and the proof that the result is right."""
