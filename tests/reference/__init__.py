"""An independent, slow reference for what a quantized checkpoint means: plain torch, no code of the product."""
