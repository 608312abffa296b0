"""Deploy a real model, query it, scale it to zero and wake it: the basis of all other end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import OpenAI

from tests.support.cluster import ENGINE_START_S, SMOLLM2, Home, write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def test_a_real_model_is_deployed_scales_to_zero_and_wakes(cluster: Home, tmp_path: Path) -> None:
    text = f"@llm({str(SMOLLM2)!r}, accelerator='cpu', cpus=0.2, idle_timeout=2)\nclass Smoke: ...\n"
    assert "+ smoke" in cluster.ok("deploy", write_app(tmp_path / "smoke" / "app.py", text))
    with OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=ENGINE_START_S, max_retries=0) as client:

        def capital() -> str:
            answer = client.chat.completions.create(
                model="smoke",
                messages=[{"role": "user", "content": "Name the capital of France."}],
                temperature=0,
                max_tokens=20,
            )
            return str(answer.choices[0].message.content)

        assert "Paris" in capital()
        cluster.wait_for("smoke", "cold", 30)
        assert not cluster.engines("smoke")
        assert "Paris" in capital()
    assert "Deleted smoke" in cluster.ok("delete", "smoke", "--yes")
