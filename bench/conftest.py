"""`pytest bench`: every case and peer as a pytest-benchmark; `--full` adds the cases that are not quick."""


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all benchmark cases, not the quick ones")
