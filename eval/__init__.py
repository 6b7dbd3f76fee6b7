"""What a model is worth: quality of its texts, golden logits in 16 bits, plain PyTorch on a CPU against others."""
