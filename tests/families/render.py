"""Rewrite the support matrix of the README: `python -m tests.families.render`."""

from tests.families.matrix import BEGIN, END, README, readme_matrix, render_matrix


def main() -> None:
    table = render_matrix()
    if readme_matrix() is None:
        print(table)
        return
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
