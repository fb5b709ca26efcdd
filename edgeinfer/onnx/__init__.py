"""ONNX models inside a memory budget: what is in a file, where it is cut, how its stages are prepared and
run.
"""
