"""The API described: an OpenAPI 3.1 document, and a page of it that loads nothing from elsewhere."""

from __future__ import annotations

import html
import json
from typing import Any

from flowalign.serve.limits import Limits

JSON = "application/json"


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


def _asked(name: str) -> dict[str, Any]:
    return {"required": True, "content": {JSON: {"schema": _ref(name)}}}


def _answers(name: str, description: str, *problems: int) -> dict[str, Any]:
    found = {"200": {"description": description, "content": {JSON: {"schema": _ref(name)}}}}
    return found | {str(status): {"$ref": "#/components/responses/Problem"} for status in problems}


def _whole(low: int, high: int | None, description: str) -> dict[str, Any]:
    top = {} if high is None else {"maximum": high}
    return {"type": ["integer", "null"], "minimum": low, **top, "description": description}


def _choice(*names: str, description: str) -> dict[str, Any]:
    return {"type": ["string", "null"], "enum": [*names, None], "description": description}


def schemas(limits: Limits) -> dict[str, Any]:
    picture = _object(
        {
            "b64_json": {"type": ["string", "null"], "description": "The encoded picture."},
            "url": {"type": ["string", "null"], "description": "Where it can be fetched for a while."},
            "revised_prompt": {"type": ["string", "null"]},
            "seed": {"type": "integer", "description": "What the embedded generator drew it from."},
        }
    )
    error = _object(
        {
            "message": {"type": "string"},
            "type": {"type": "string"},
            "param": {"type": ["string", "null"]},
            "code": {"type": ["string", "null"]},
        },
        ("message", "type", "param", "code"),
    )
    return {
        "GenerationRequest": _object(
            {
                "prompt": {"type": "string", "minLength": 1, "maxLength": limits.prompt},
                "n": _whole(1, limits.n, "How many pictures."),
                "size": {"type": ["string", "null"], "description": "auto, or WIDTHxHEIGHT in pixels."},
                "response_format": _choice("b64_json", "url", description="How pictures are answered."),
                "output_format": _choice("png", "jpeg", "webp", description="How they are encoded."),
                "output_compression": _whole(0, 100, "Quality of JPEG and WebP."),
                "seed": _whole(0, None, "Of the first picture, the next ones have the numbers after it; generator only."),
                "model": {"type": ["string", "null"], "description": "See /v1/models."},
                "user": {"type": ["string", "null"]},
            },
            ("prompt",),
        ),
        "Pictures": _object(
            {"created": {"type": "integer"}, "data": {"type": "array", "items": picture}, "size": {"type": "string"}},
            ("created", "data"),
        ),
        "Model": _object({"id": {"type": "string"}, "object": {"const": "model"}, "created": {"type": "integer"}}, ("id",)),
        "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}}, ("object", "data")),
        "ScoreRequest": _object(
            {
                "images": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": limits.scored,
                    "items": _object(
                        {"b64_json": _text("A PNG or a lossless WebP."), "prompt": _text("What it should show.")}, ("b64_json",)
                    ),
                },
                "rewards": {"type": ["array", "null"], "items": {"type": "string"}, "description": "All where left out."},
            },
            ("images",),
        ),
        "Scores": _object(
            {
                "object": {"const": "list"},
                "data": {
                    "type": "array",
                    "items": _object(
                        {
                            "index": {"type": "integer"},
                            "scores": {"type": "object", "additionalProperties": {"type": ["number", "null"]}},
                            "errors": {"type": "object", "additionalProperties": {"type": "string"}},
                        },
                        ("index", "scores", "errors"),
                    ),
                },
                "rewards": {"type": "array", "items": {"type": "object"}, "description": "The rewards' cards."},
            },
            ("object", "data", "rewards"),
        ),
        "Problem": _object({"error": error}, ("error",)),
        "Health": _object({"status": {"type": "string"}}, ("status",)),
    }


def document(version: str, limits: Limits, *, role: str | None, scores: bool) -> dict[str, Any]:
    """What a server of this role answers; paths as the app has them."""
    paths: dict[str, Any] = {}
    if role is not None:
        flow = {"x-flowalign": {"description": "applied, untouched or partial, with reasons.", "schema": {"type": "string"}}}
        made = _answers("Pictures", "The pictures.", 400, 401, 408, 413, 415, 429, 502, 503, 504)
        made["200"]["headers"] = flow
        text = "Draw pictures." if role == "generator" else "Have the upstream draw pictures, and move them along the flow."
        model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        token = {"name": "token", "in": "path", "required": True, "schema": {"type": "string"}}
        paths |= {
            "/v1/images/generations": {
                "post": {"summary": text, "requestBody": _asked("GenerationRequest"), "responses": made},
            },
            "/v1/images/content/{token}": {
                "get": {
                    "summary": "A picture that was answered as a url.",
                    "security": [],
                    "parameters": [token],
                    "responses": {"200": {"description": "The picture."}, "404": {"$ref": "#/components/responses/Problem"}},
                }
            },
            "/v1/models": {"get": {"summary": "All models.", "responses": _answers("Models", "The models.", 401)}},
            "/v1/models/{model}": {
                "get": {"summary": "One model.", "parameters": [model], "responses": _answers("Model", "It.", 401, 404)}
            },
        }
    if scores:
        paths["/v1/score"] = {
            "post": {
                "summary": "Score pictures with rewards.",
                "requestBody": _asked("ScoreRequest"),
                "responses": _answers("Scores", "Raw scores, in each reward's own direction.", 400, 401, 413, 503),
            }
        }
    for path, text in (("/healthz", "Whether the process lives."), ("/readyz", "Whether it takes requests.")):
        paths[path] = {"get": {"summary": text, "security": [], "responses": _answers("Health", "It does.", 503)}}
    paths["/metrics"] = {"get": {"summary": "Prometheus' text format.", "responses": {"200": {"description": "Metrics."}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "flowalign", "version": version, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": schemas(limits),
            "responses": {"Problem": {"description": "Not done.", "content": {JSON: {"schema": _ref("Problem")}}}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def page(described: dict[str, Any]) -> str:
    """The document as one page of HTML without scripts."""
    parts = [f"<h1>{html.escape(described['info']['title'])} {html.escape(described['info']['version'])}</h1>"]
    parts.append('<p>The same for machines: <a href="openapi.json">openapi.json</a></p>')
    for path, methods in described["paths"].items():
        for method, about in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(about['summary'])}</p>")
            for media in about.get("requestBody", {}).get("content", {}).values():
                parts.append(f"<p>Body: {_link(media['schema'])}</p>")
            for status, answer in about["responses"].items():
                for media in answer.get("content", {}).values():
                    parts.append(f"<p>{status}: {_link(media['schema'])}</p>")
    for name, schema in described["components"]["schemas"].items():
        text = html.escape(json.dumps(schema, indent=2))
        parts.append(f'<h3 id="{name}">{name}</h3><pre>{text}</pre>')
    style = "body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}pre{overflow:auto;background:#f4f4f4}"
    head = f'<meta charset="utf-8"><title>flowalign API</title><style>{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def _link(schema: dict[str, str]) -> str:
    name = schema["$ref"].rpartition("/")[2]
    return f'<a href="#{name}">{name}</a>'
