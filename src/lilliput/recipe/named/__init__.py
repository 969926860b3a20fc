"""Named recipes, one YAML file each: `--recipe w4` reads w4.yaml."""
