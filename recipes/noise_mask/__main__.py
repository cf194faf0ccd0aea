from recipes._cli import run
from recipes.noise_mask.comparison import compare

code = run("recipes.noise_mask.module.NoiseMaskPolicy", "noise_mask")
raise SystemExit(code or compare())
