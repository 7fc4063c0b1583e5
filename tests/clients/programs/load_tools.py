"""guidellm or aiperf, by its command line, with a handful of requests of random words.

Usage: load_tools.py guidellm|aiperf; CHAT_URL and TOKENIZER are in the environment.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL, TOKENIZER = os.environ["CHAT_URL"], os.environ["TOKENIZER"]
COMMANDS = {
    "guidellm": f"""run --backend kind=openai_http,target={URL},model=smollm2-135m
        --profile kind=concurrent,streams=2 --constraint kind=max_requests,count=4
        --tokenizer kind=hf_auto,model={TOKENIZER}
        --data kind=synthetic_text,prompt_tokens=32,output_tokens=8
        --disable-console-interactive""",
    "aiperf": f"""profile --model smollm2-135m --url {URL} --endpoint-type chat --streaming
        --tokenizer {TOKENIZER} --concurrency 2 --request-count 4
        --synthetic-input-tokens-mean 32 --output-tokens-mean 8 --ui none""",
}
RESULT = {"guidellm": "benchmarks.json", "aiperf": "profile_export_aiperf.json"}

program = sys.argv[1]
settings = dict(os.environ)
if program == "aiperf":
    # Its offline mode looks for a hub's snapshot, and not for a folder.
    settings.pop("HF_HUB_OFFLINE", None)
with tempfile.TemporaryDirectory() as folder:
    command = [str(Path(sys.executable).with_name(program)), *COMMANDS[program].split()]
    subprocess.run(command, check=True, cwd=folder, env=settings)
    assert list(Path(folder).rglob(RESULT[program])), "there is no report"
