"""Pretrained weights of timm's from the hub, and whether a server answers at all."""
import contextlib
import http.client
import threading
import urllib.request

import timm
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE

from quantizers import check


def reachable(url: str, seconds: float = 8) -> bool:
    """Whether url answers. A thread bounds the wait: urlopen's time-out does not where a network drops packets."""
    answers = []

    def request():
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):  # also an address that is none
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answers.append(True)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def weights_file(name: str) -> str:
    """The path of timm's weights of that name, downloaded if need be. RuntimeError within seconds where that fails: the
    hub's own client would retry for a minute."""
    source = timm.get_pretrained_cfg(name)
    check(source.hf_hub_id, "ENCODER", name, "a ViT for which timm has pretrained weights")
    file = source.hf_hub_filename or "model.safetensors"
    cached = try_to_load_from_cache(source.hf_hub_id, file, cache_dir=HF_HUB_CACHE)
    if isinstance(cached, str):
        return cached
    if not reachable(ENDPOINT):
        raise RuntimeError(f"the weights of {source.hf_hub_id} are not in {HF_HUB_CACHE}, and {ENDPOINT} cannot be "
                           'reached; ENCODER = "cifar" needs no download')
    try:
        return hf_hub_download(source.hf_hub_id, file, cache_dir=HF_HUB_CACHE)
    except Exception as error:  # the hub's client and its libraries raise many kinds
        reason = " ".join(str(error).split())
        raise RuntimeError(f"the weights of {source.hf_hub_id} could not be downloaded: {reason}") from None
