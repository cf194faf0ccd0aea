from recipes._cli import run

raise SystemExit(run("recipes.adversarial_training.module.AdversarialTrainer", "adversarial_training"))
