from recipes._cli import run

raise SystemExit(run("recipes.grok.module.Grok", "grok"))
