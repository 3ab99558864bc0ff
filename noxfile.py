"""Sessions on the oldest and the newest PyTorch: `nox -s tests`. All else is in the Makefile."""

import nox

nox.options.default_venv_backend = "venv"

# (torch, Python): the oldest that pyproject.toml allows, and the newest that was tried
OLDEST = ("2.9.1", "3.10")
NEWEST = ("2.15.0", "3.13")


@nox.session
@nox.parametrize(("torch", "python"), [OLDEST, NEWEST], ids=["oldest", "newest"])
def tests(session: nox.Session, torch: str) -> None:
    """Run the tests with one PyTorch; the other packages are as new as it allows."""
    session.install(f"torch=={torch}", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python=NEWEST[1])
def wheel(session: nox.Session) -> None:
    """Build, install the wheel alone, and use it away from the checkout."""
    session.install("build")
    out = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", out)
    session.install(f"torch=={NEWEST[0]}", "funcparam", "--find-links", out)
    session.chdir(out)
    session.run("python", "-c", "import funcparam; help(funcparam.parametrize)")


@nox.session(python="3.11")
def ecosystem(session: nox.Session) -> None:
    """Run real packages, pinned, on compat and on torch; see tests/ecosystem."""
    folder = "tests/ecosystem"
    session.install("--no-deps", "-r", f"{folder}/constraints.txt", "-e", ".")
    overlay = session.create_tmp()
    older = f"{folder}/transformers4.txt"
    session.run("pip", "install", "--no-deps", "--upgrade", "-r", older, "--target", overlay)
    session.run("python", "-m", "tests.ecosystem", "--overlay", overlay, *session.posargs)
