"""Contrastive LoRA fine-tuning of a language model as a sentence embedder."""
