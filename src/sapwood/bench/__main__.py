"""`python -m sapwood.bench` is `sapwood bench`, also where the package is not installed."""

from sapwood.bench.cli import bench

if __name__ == "__main__":
    bench(prog_name="sapwood bench")
