from recipes._cli import run

raise SystemExit(run("recipes.scalelong.module.Diffusion", "scalelong"))
