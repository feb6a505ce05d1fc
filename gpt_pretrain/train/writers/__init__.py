"""Where metrics go: console, TensorBoard, W&B."""
