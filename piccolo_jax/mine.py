"""Mines hard negatives: searches a corpus with a model, and draws from what lies near a query.

    python -m piccolo_jax.mine --model=DIR --queries=FILE --corpus=FILE --output=FILE.jsonl
        [--ranks=50:100] [--count=15] [--max-positive-ratio=0.95] [--margin=M] [--max-score=S]

OUTPUT has a row {text, text_pos, text_neg, neg_ranks, neg_scores, type} per query, which training
reads; OUTPUT's name with .report in place of .jsonl is a folder with report.json and plots.
"""

import argparse
import json
import math
import os
import shutil
import uuid
from pathlib import Path

import jax
import numpy as np

from piccolo_jax import cli, distributed
from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import encoder as encoder_lib
from piccolo_jax.evaluation.encoder import Encoder, cut
from piccolo_jax.evaluation.models import fingerprint
from piccolo_jax.metrics import say
from piccolo_jax.mining import corpus as corpus_lib
from piccolo_jax.mining import embeddings, positives, report, rules
from piccolo_jax.mining import queries as queries_lib
from piccolo_jax.mining.corpus import Corpus
from piccolo_jax.mining.queries import Query
from piccolo_jax.mining.search import Neighbours, search
from piccolo_jax.models import pretrained


def main(argv: list[str]) -> None:
    """The command."""
    args = _parser().parse_args(argv[1:])
    window = rules.parse_window(args.ranks, args.count)
    limits = _limits(args)
    _check_output(args.output, args.overwrite)
    distributed.start()
    is_first = jax.process_index() == 0
    with distributed.agreed("reading the model and the texts"):
        if not args.model.is_dir():
            raise UserError(f"--model={args.model}: is not a folder with a model")
        inputs = queries_lib.read(args.queries, args.corpus, args.split, progress=is_first)
        corpus = inputs.corpus
        if window.last > len(corpus):
            raise UserError(
                f"--ranks={args.ranks}: goes beyond the {len(corpus)} passages of {corpus.source}"
            )
        prompts = _prompts(args)
    for note in inputs.notes:
        say(note)
    mesh = MeshConfig(fsdp=args.fsdp, tensor=args.tensor)
    encoder, params = encoder_lib.load(args.model, mesh, dtype="auto")
    if not 0 <= args.dim <= encoder.width:
        raise UserError(f"--dim={args.dim}: must be from 1 to {encoder.width}, the model's width")
    dim = args.dim or encoder.width

    # Embeddings, from the cache where they are there.
    cache = args.cache or args.output.absolute().parent / "embeddings"
    model = fingerprint(args.model)

    def embed(name: str, texts: Corpus, prompt: str, max_length: int) -> np.ndarray:
        limited = _with_length(encoder, max_length)
        return embeddings.embed(cache, name, texts, limited, params, model, prompt)

    query_texts = corpus_lib.of_texts((q.text for q in inputs.queries), "the queries")
    place = {text: i for i, text in enumerate(query_texts.texts)}
    places = np.asarray([place[query.text] for query in inputs.queries])
    query_rows = embed("queries", query_texts, prompts["query"], args.query_max_length)
    query_rows = cut(query_rows, dim)
    rows = embed("corpus", corpus, prompts["passage"], args.max_length)
    others = positives.not_in(corpus, inputs.queries)
    other_rows = np.zeros((0, encoder.width), np.float32)
    if others:
        texts = corpus_lib.of_texts(others, "the positives")
        other_rows = embed("positives", texts, prompts["passage"], args.max_length)
    lowest = positives.lowest_scores(
        inputs.queries, query_rows[places], corpus, rows, others, other_rows
    )

    # Neighbours, and what is left of them.
    say(f"searching {len(corpus)} passages for {len(query_texts)} queries at {dim} dimensions")
    found = search(
        query_rows, rows, window.last, encoder.mesh, dim, _budget(args, encoder),
        progress="searching" if is_first else "",
    )  # fmt: skip
    found = Neighbours(found.scores[places], found.indices[places])
    mined = rules.mine(inputs.queries, corpus, found, lowest, window, limits, args.seed)
    about = {
        "model": str(args.model), "model_fingerprint": model, "queries_path": args.queries,
        "corpus": corpus.source, "passages": len(corpus), "dim": dim, "seed": args.seed,
        "prompts": prompts, "notes": list(inputs.notes),
        "mean_positive_score": round(float(lowest.mean()), 6),
    }  # fmt: skip
    summary = report.numbers(mined, limits, about)
    with distributed.agreed("writing the output"):
        if is_first:
            folder = report_folder(args.output)
            partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
            try:
                report.write(partial, summary)
                _write(args.output, inputs.queries, corpus, mined)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            print(report.text(summary))
            print(f"negatives in {args.output}, report and plots in {folder}")


def report_folder(output: Path) -> Path:
    """Where the report of an output goes."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.report")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="piccolo_jax.mine", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a sentence-transformers folder")
    add("--queries", required=True,
        help="a training file with queries and positives, or a BEIR folder")  # fmt: skip
    add("--corpus", default="",
        help="rows {id, title, text}, or a training file, whose passages it is; default: the"
        " corpus.jsonl of the BEIR folder, or the passages of the queries' file")  # fmt: skip
    add("--output", type=Path, required=True, help="a .jsonl file to write")
    add("--split", default="train", help="of a BEIR folder; default: train")
    add("--ranks", default="50:100", help="FIRST:LAST, both inclusive, 1 is the nearest passage")
    add("--count", type=int, default=15, help="negatives drawn for a query; default: 15")
    add("--max-positive-ratio", type=float, metavar="R",
        help="keep what scores below R times the positive, e.g. 0.95; default: off")  # fmt: skip
    add("--margin", type=float, metavar="M",
        help="keep what scores below the positive less M; default: off")  # fmt: skip
    add("--max-score", type=float, metavar="S", help="keep what scores below S; default: off")
    add("--dim", type=int, default=0, help="prefix to search with; default: the whole width")
    add("--query-prompt", help="put before queries; default: the model's prompt `query`")
    add("--passage-prompt", help="put before passages; default: the model's prompt `passage`")
    add("--query-max-length", type=int, default=0, help="tokens; default: the model's")
    add("--max-length", type=int, default=0, help="tokens of a passage; default: the model's")
    add("--seed", type=int, default=0, help="of what is drawn; default: 0")
    add("--cache", type=Path, help="folder of embeddings; default: `embeddings` beside OUTPUT")
    add("--device-memory", type=float, default=0.0, metavar="GIB",
        help="budget for the corpus on each device, beyond which it passes through in blocks;"
        " default: half of the device's memory")  # fmt: skip
    add("--fsdp", type=int, default=1, help="devices that the model's parameters are split over")
    add("--tensor", type=int, default=1, help="devices that its products are split over")
    add("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    return parser


def _limits(args: argparse.Namespace) -> rules.Limits:
    for name, low, high in (
        ("max_positive_ratio", 0, 2), ("margin", 0, 2), ("max_score", -1, 2),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}={value}: must be from {low} to {high}")
    if not math.isfinite(args.device_memory) or args.device_memory < 0:
        raise UserError(f"--device-memory={args.device_memory}: must be 0 or more GiB")
    if args.seed < 0:
        raise UserError(f"--seed={args.seed}: must be 0 or greater")
    return rules.Limits(args.max_positive_ratio, args.margin, args.max_score)


def _check_output(output: Path, overwrite: bool) -> None:
    folder = output.absolute().parent
    if output.is_dir():
        raise UserError(f"--output={output}: is a folder; name a file to write")
    if output.suffix != ".jsonl":
        raise UserError(f"--output={output}: must end in .jsonl, so that training can read it")
    if not folder.is_dir():
        raise UserError(f"--output={output}: the folder does not exist")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output={output}: the folder can't be written")
    for path in (output, report_folder(output)):
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; --overwrite replaces it")


def _prompts(args: argparse.Namespace) -> dict[str, str]:
    """Those of the flags, else of the model's directory."""
    own = pretrained.read_spec(args.model).prompts
    prompts = {
        "query": own.get("query", ""),
        "passage": own.get("passage", own.get("document", "")),
    }
    for name, given in (("query", args.query_prompt), ("passage", args.passage_prompt)):
        prompts[name] = prompts[name] if given is None else given
        say(f"prompt of a {name}: {prompts[name]!r}")
    return prompts


def _with_length(encoder: Encoder, max_length: int) -> Encoder:
    """The encoder with another limit; 0: its own. Raises UserError if it has fewer positions."""
    if not max_length:
        return encoder
    most = encoder.model.backbone.max_positions
    if not 3 <= max_length <= most:
        raise UserError(
            f"--max-length, --query-max-length = {max_length}: must be from 3 to {most} tokens, the"
            " positions of the model"
        )
    return Encoder(encoder.model, encoder.tokenizer, encoder.mesh, max_length)


def _budget(args: argparse.Namespace, encoder: Encoder) -> int:
    """Bytes of a device for the corpus; 0: no limit."""
    if args.device_memory:
        return int(args.device_memory * 2**30)
    stats = encoder.mesh.local_devices[0].memory_stats() or {}
    return stats.get("bytes_limit", 0) // 2


def _write(output: Path, queries: list[Query], corpus: Corpus, mined: rules.Mined) -> None:
    partial = output.with_name(f"{output.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for i, (query, places) in enumerate(zip(queries, mined.drawn, strict=True)):
                row = {
                    "text": query.text,
                    "text_pos": list(query.positives),
                    "text_neg": [corpus.texts[int(n)] for n in mined.neighbours.indices[i, places]],
                    "neg_ranks": [mined.window.first + int(place) for place in places],
                    "neg_scores": [round(float(s), 6) for s in mined.neighbours.scores[i, places]],
                    "type": "retri_contrast",
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"{output}: can't be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main)
