from recipes._cli import run

raise SystemExit(run("recipes.attention_at.module.AttentionClassifier", "attention_at"))
