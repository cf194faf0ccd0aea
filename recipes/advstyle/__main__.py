from recipes._cli import run

raise SystemExit(run("recipes.advstyle.module.DomainGeneralizer", "advstyle"))
