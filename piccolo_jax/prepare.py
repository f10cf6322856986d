"""Prepares the datasets of a config for training, which otherwise does so on first use.

    python -m piccolo_jax.prepare --config=configs/NAME.py --workdir=DIR [--config.FIELD=VALUE ...]

Needs no accelerator. Writes what is not there yet to config.data.prepared_dir, or WORKDIR/prepared.
"""

from pathlib import Path

from piccolo_jax import build, cli, metrics
from piccolo_jax.data.prepare import prepare_datasets
from piccolo_jax.tasks import TASKS


def main(argv: list[str]) -> None:
    """The command."""
    config, workdir = cli.parse_config(argv, __doc__ or "")
    tokenizer = build.build(config).tokenizer
    root = Path(config.data.prepared_dir or workdir / "prepared")
    rows = []
    for dataset in prepare_datasets(config, tokenizer, TASKS, root):
        m = dataset.store.manifest
        rows.append([
            m["name"], m["task"], m["rows"], m["rejected"], m["texts"], m["mean_tokens"],
            m["longest_tokens"], m["truncated_texts"], f"{m['name']}-{m['fingerprint']}",
        ])  # fmt: skip
        for item in m["rejected_rows"][:5]:
            print(f"rejected {item['place']}: {item['reason']}")
    header = ("dataset", "task", "rows", "rejected", "texts", "tokens", "longest", "cut", "folder")
    print(metrics.table(header, rows))
    print(f"prepared in {root}")


if __name__ == "__main__":
    cli.run(main)
