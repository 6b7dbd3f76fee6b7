"""What a model is worth: programs and texts that it writes, golden logits in 16 bits, plain PyTorch against others."""
