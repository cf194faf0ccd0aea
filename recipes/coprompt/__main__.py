from recipes._cli import run

raise SystemExit(run("recipes.coprompt.module.CoPrompt", "coprompt"))
