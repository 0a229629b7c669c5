"""Bodies that the API's documentation shows: a real job, and a real upload."""

from typing import Any

A_JOB: dict[str, Any] = {
    "name": "brain-mri-unet",
    "tags": ["brain", "int8"],
    "recipe": {
        "source": {
            "architecture": {
                "library": "monai",
                "name": "BasicUNet",
                "arguments": {"spatial_dims": 2, "in_channels": 1, "out_channels": 4},
            },
            "weights": "01932f6e-2c60-7d3e-9a52-6f0f3b1c7a10",
        },
        "task": {
            "kind": "segmentation",
            "classes": ["background", "other", "grey matter", "white matter"],
            "background": 0,
        },
        "data": {
            "artifact": "01932f6e-2c60-7d3e-9a52-6f0f3b1c7a11",
            "preprocessing": {"channels": 1, "scale": 1.0, "mean": [0.0], "std": [1.0]},
        },
        "stages": [
            {"kind": "export_onnx"},
            {"kind": "quantize", "scheme": "int8_static", "calibration_samples": 64},
            {"kind": "build_engine", "targets": ["cpu-fastest"]},
        ],
        "goals": [
            {"metric": "dice", "kind": "max_drop", "value": 0.01},
            {"metric": "latency", "kind": "min_speedup", "value": 3},
        ],
    },
}

AN_UPLOAD: dict[str, Any] = {
    "name": "unet.safetensors",
    "format": "safetensors",
    "size_bytes": 1938484,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
}
