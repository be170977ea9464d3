"""A network as an ONNX file that was checked before it appears, and passes over its graph.

`export.to_onnx` and `export.check` need torch; the passes, a file each, need onnx and NumPy alone,
so that a device without torch can run them. Hence nothing is imported here.
"""
