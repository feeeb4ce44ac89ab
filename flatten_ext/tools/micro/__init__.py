"""What demo and ablation share: vision transformers that learn in minutes, their images, their training."""
