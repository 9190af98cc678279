"""The tolerances of the project, in one place (design: Numerics). A failing test is mended in the code, never here."""

LOGITS = 2e-4  # max abs logit difference to Hugging Face, fp32; absorbed, cached, chunked, batched and grouped paths to the naive one
KERNEL_FP32 = 1e-4  # float32 kernels to a float64 reference, absolute and relative
KERNEL_BF16 = 2**-7  # bfloat16 kernels to a float64 reference of the same operands: a step of bfloat16, for weights and results are both rounded to it
FP8_PRODUCT = 1e-3  # FP8 products to a reference of the same quantised operands, relative Frobenius error
