"""The tolerances of the project, in one place (design: Numerics). A failing test is mended in the code, never here."""

LOGITS = 2e-4  # max abs logit difference to Hugging Face, fp32; absorbed, cached, chunked, batched and grouped paths to the naive one
