from recipes._cli import run

raise SystemExit(run("recipes.classifier.module.Classifier", "classifier"))
