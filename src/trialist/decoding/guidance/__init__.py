"""Guided decoding: OPAD, classifier-free guidance, context-aware and contrastive decoding."""
