from recipes._cli import run

raise SystemExit(run("recipes.lazy_to_rich.module.LazyToRich", "lazy_to_rich"))
