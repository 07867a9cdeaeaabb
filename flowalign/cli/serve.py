"""The commands that serve: an images API, and the page of a steered run."""

from __future__ import annotations

import argparse
from typing import Any

from flowalign.cli.arguments import PRECISIONS, Command, natural, positive, scale

LIMITS = {
    "max_n": ("n", positive, "pictures of one request (10)"),
    "max_pixels": ("pixels", positive, "width x height of one picture (16777216)"),
    "max_body": ("body", positive, "bytes of a request for pictures (1048576)"),
    "max_answer": ("answer", positive, "bytes of an upstream's answer (134217728)"),
    "concurrency": ("concurrency", positive, "requests worked on at once (32)"),
    "queue": ("queue", natural, "requests that wait for that (64)"),
    "upstream_timeout": ("upstream_timeout", scale, "seconds an upstream has (300)"),
    "flow_timeout": ("flow_timeout", scale, "seconds the flow has before pictures go out untouched (30)"),
    "drain_timeout": ("drain_timeout", scale, "seconds requests in work have once the server is told to stop (60)"),
    "batch_size": ("batch", positive, "pictures that one call of a model takes (8)"),
    "keep": ("stored_seconds", scale, "seconds that a picture answered as a url is kept (3600)"),
}
"""Option -> the limit of `serve.limits.Limits` that it sets, its type, and what it says of itself."""


def add(command: Command) -> None:
    serve = command("serve", _serve, "Serve a checkpoint, or another images API with a flow behind it, like OpenAI's.")
    serve.add_argument("--generator", metavar="CHECKPOINT", help="draw with a diffusers folder, a hub id or a run folder")
    serve.add_argument("--upstream", metavar="URL", help="stand in front of this images API, such as https://HOST/v1")
    serve.add_argument("--flow", metavar="RUN", help="move every picture along the flow of this run folder")
    serve.add_argument("--strength", type=scale, metavar="S", help="how far, 0 to 1; by default as the run says")
    serve.add_argument("--rewards", action="extend", nargs="+", default=[], metavar="NAME|FILE", help="offer them at /v1/score")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s)")
    serve.add_argument("--port", type=natural, default=8000, help="0 takes a free one (%(default)s)")
    serve.add_argument(
        "--api-key", metavar="KEY", help="what callers must send; better set FLOWALIGN_API_KEY, which no other user can read"
    )
    serve.add_argument("--allow-public", action="store_true", help="serve other machines without a key")
    serve.add_argument(
        "--parent", type=positive, metavar="PID", help="end as soon as this process, the one that starts it, has"
    )
    serve.add_argument("--public-url", metavar="URL", help="how callers reach this server, if not by its own address")
    serve.add_argument(
        "--url-host",
        action="extend",
        nargs="+",
        default=[],
        dest="url_hosts",
        metavar="HOST",
        help="fetch pictures that the upstream answers as urls from here too",
    )
    serve.add_argument(
        "--model-name", action="extend", nargs="+", default=[], dest="model_names", metavar="NAME", help="of the generator"
    )
    _add_drawing(serve)
    for name, (_, kind, text) in LIMITS.items():
        serve.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)

    explore = command("explore", _explore, "Open a page with a slider for each objective of a steered run.")
    explore.add_argument("run", metavar="RUN", help="a run folder with a section steer")
    explore.add_argument("--prompt", metavar="TEXT", help="that the page begins with; by default one that the run drew")
    explore.add_argument("--port", type=natural, default=8000, help="of this machine; 0 takes a free one (%(default)s)")
    explore.add_argument("--batch-size", type=positive, default=8, metavar="N", help="pictures drawn together (%(default)s)")
    _add_drawing(explore)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    """How pictures are drawn, and what is said meanwhile."""
    parser.add_argument("--steps", type=positive, default=25, help="denoising steps (%(default)s)")
    parser.add_argument("--guidance", type=scale, default=5.0, help="classifier-free guidance scale (%(default)s)")
    parser.add_argument("--sampler", metavar="NAME", default="default", help="by default the checkpoint's own")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="%(choices)s (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(%(default)s)")


def _serve(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    given = {limit: getattr(options, name) for name, (limit, _, _) in LIMITS.items() if getattr(options, name) is not None}
    names = (
        "generator",
        "upstream",
        "flow",
        "strength",
        "rewards",
        "host",
        "port",
        "api_key",
        "parent",
        "allow_public",
        "public_url",
        "url_hosts",
        "model_names",
        "steps",
        "guidance",
        "sampler",
        "precision",
        "device",
        "log_level",
    )
    return runs.serve(limits=given, **{name: getattr(options, name) for name in names})


def _explore(options: argparse.Namespace) -> dict[str, Any]:
    from flowalign import runs

    names = ("prompt", "port", "batch_size", "steps", "guidance", "sampler", "precision", "device", "log_level")
    return runs.explore(options.run, **{name: getattr(options, name) for name in names})
