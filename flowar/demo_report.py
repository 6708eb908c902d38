"""The demo's one-page report: pictures and numbers in one file that opens without a network."""

from html import escape
from pathlib import Path

from flowar.config import DemoConfig, describe_config
from flowar.pages import embed, write_page

REPORT_FILE = "report.html"


def write_report(run_dir: Path, config: DemoConfig, numbers: dict[str, float]) -> Path:
    """Write report.html, all pictures inside, and return its path."""
    ratio = numbers["fid_samples"] / numbers["fid_training"]
    rows = "".join(
        f"<tr><td>{name}</td><td>{numbers[f'{key}_samples']:.2f}</td><td>{numbers[f'{key}_training']:.2f}</td></tr>"
        for name, key in (
            ("Fr&eacute;chet distance (lower is better)", "fid"),
            ("Inception score (10 at most)", "inception_score"),
            ("precision", "precision"),
            ("recall", "recall"),
        )
    )
    side_labels = ", ".join(f"{side}&times;{side}" for side in config.train.model.scales)
    body = f"""<h1>FlowAR on handwritten digits</h1>
<p class="note">Trained from scratch on scikit-learn's digits; the
last call of the demo took {numbers["minutes"]:.1f} minutes.</p>
<h2>Numbers</h2>
<p><b>{numbers["class_accuracy"]:.1%}</b> of {config.num_samples} samples show the digit they were asked for, by a
classifier that was trained on the real training digits and knows {numbers["judge_accuracy"]:.1%} of the real held-out
ones.</p>
<table><tr><th>against the held-out digits</th><th>samples</th><th>real training digits</th></tr>{rows}</table>
<p class="note">On the classifier's 64 features, by torch-fidelity. The samples are {ratio:.2f} times as far from the
held-out digits as the training digits are.</p>
<h2>Samples, a row per class</h2>
{embed(run_dir / "contact_sheet.png")}
<h2>Real held-out digits, a row per class</h2>
{embed(run_dir / "real_digits.png")}
<h2>One sample of each class, growing scale by scale</h2>
<p class="note">From top to bottom the scales {side_labels}, each brought to full size and decoded by the VAE.</p>
{embed(run_dir / "growth.png")}
<h2>Training loss</h2>
{embed(run_dir / "loss_curve.png", "curve")}
<h2>Settings</h2>
<pre>{escape(describe_config(config))}</pre>
"""
    write_page(run_dir / REPORT_FILE, "FlowAR demo", body)
    return run_dir / REPORT_FILE
