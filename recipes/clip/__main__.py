from recipes._cli import run

raise SystemExit(run("recipes.clip.module.Contrastive", "clip"))
