"""Device code: `@triton.jit` functions only. No torch, no launches; `math` has no pointers."""
