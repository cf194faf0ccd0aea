from recipes._cli import run

raise SystemExit(run("recipes.near_features.module.NearFeatures", "near_features"))
