"""Everything odd or faulty that ISBI 2015 data sets have been seen with, to be planted.

Each entry of `ODDITIES` changes a generated data set in place, and says what a reader must report.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from medtrain.data.synthetic import Oddity


def _films(folder: Path) -> list[Path]:
    suffixes = {".bmp", ".png", ".jpg", ".tif"}
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in suffixes)


def _film(folder: Path, index: int) -> Path:
    films = _films(folder)
    return films[index % len(films)]


def _notes(folder: Path, *, reader: str = "", film: Path | None = None) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*.txt")
        if reader in path.parent.name and (film is None or path.stem == film.stem)
    )


def _store_as(suffix: str, mode: str = "L") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from PIL import Image

        for path in _films(folder):
            with Image.open(path) as image:
                stored = image.convert(mode)
            path.unlink()
            stored.save(path.with_suffix(suffix))

    return change


def _rewrite_notes(change: Callable[[str], str]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        for path in _notes(folder):
            path.write_bytes(change(path.read_text()).encode())

    return rewrite


def _rewrite_note(index: int, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    """Change the lines of the senior's file for one film."""

    def rewrite(folder: Path) -> None:
        (path,) = _notes(folder, reader="senior", film=_film(folder, index))
        path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")

    return rewrite


def _nest(folder: Path) -> None:
    (folder / "RawImage").rename(folder / "inner")
    (folder / "RawImage").mkdir()
    (folder / "inner").rename(folder / "RawImage" / "RawImage")


def _lift(name: str) -> Callable[[Path], None]:
    """Move what lies in a folder one level up."""

    def lift(folder: Path) -> None:
        for path in (folder / name).iterdir():
            path.rename(folder / path.name)
        (folder / name).rmdir()

    return lift


def _small_letters(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rename(path.with_name(path.name.lower()))


def _capital_suffix(folder: Path) -> None:
    for path in _films(folder):
        path.rename(path.with_suffix(path.suffix.upper()))


def _short_names(folder: Path) -> None:
    for path in [*_films(folder), *_notes(folder)]:
        path.rename(path.with_stem(str(int(path.stem))))


def _hidden_files(folder: Path) -> None:
    (folder / ".DS_Store").write_bytes(b"\0")
    film = _film(folder, 0)
    film.with_name(f"._{film.name}").write_bytes(b"\0")
    copy = folder / "__MACOSX" / film.parent.name / film.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"\0")


def _archives_beside(folder: Path) -> None:
    for name in ("RawImage.rar", "AnnotationsByMD.rar"):
        (folder / name).write_bytes(b"Rar!\x1a\x07\x00")


def _archives_only(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
    _archives_beside(folder)


def _annotations_packed(folder: Path) -> None:
    shutil.rmtree(folder / "AnnotationsByMD")
    (folder / "AnnotationsByMD.rar").write_bytes(b"Rar!\x1a\x07\x00")


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def _patients(folder: Path) -> None:
    """Two neighboring films a patient."""
    films = _films(folder)
    lines = [f"{path.name},p{n // 2 + 1}" for n, path in enumerate(films)]
    (folder / "patients.csv").write_text("\n".join(["image,patient", *lines]) + "\n")


def _patient_of_two_folders(folder: Path) -> None:
    by_folder = {path.parent.name: path for path in reversed(_films(folder))}
    lines = [f"{path.stem},p1" for path in by_folder.values()]
    (folder / "patients.csv").write_text("\n".join(["image,patient", *lines]) + "\n")


def _missing_annotation(folder: Path) -> None:
    _notes(folder, reader="senior", film=_film(folder, 0))[0].unlink()


def _missing_reader(folder: Path) -> None:
    for path in _notes(folder, reader="junior"):
        path.unlink()


def _missing_film(folder: Path) -> None:
    _film(folder, 1).unlink()


def _empty_film(folder: Path) -> None:
    _film(folder, 2).write_bytes(b"")


def _truncate(folder: Path) -> None:
    path = _film(folder, 3)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _duplicate(folder: Path) -> None:
    first, *_, last = _films(folder)
    shutil.copyfile(first, last)


def _duplicate_of_one_patient(folder: Path) -> None:
    _duplicate(folder)
    first, *_, last = _films(folder)
    text = f"image,patient\n{first.stem},p1\n{last.stem},p1\n"
    (folder / "patients.csv").write_text(text)


def _number_twice(folder: Path) -> None:
    first, *_, last = _films(folder)
    shutil.copyfile(first, last.with_name(first.name))


def _mirror(folder: Path) -> None:
    from PIL import Image, ImageOps

    path = _film(folder, 4)
    with Image.open(path) as image:
        width, mirrored = image.width, ImageOps.mirror(image)
    mirrored.save(path)
    for note in _notes(folder, film=path):
        lines = []
        for line in note.read_text().splitlines():
            x, comma, y = line.partition(",")
            lines.append(f"{width - 1 - int(x)},{y}" if comma else line)
        note.write_text("\n".join(lines) + "\n")


def _other_size(folder: Path) -> None:
    from PIL import Image, ImageOps

    path = _film(folder, 5)
    with Image.open(path) as image:
        larger = ImageOps.expand(image.convert("L"), border=(0, 0, 16, 16))
    larger.save(path)


def _elsewhere(folder: Path) -> None:
    film = _film(folder, 0)
    (folder / "thumbnails").mkdir()
    shutil.copyfile(film, folder / "thumbnails" / film.name)


ODDITIES: Mapping[str, Oddity] = {
    # accepted as it is
    "nested_raw": Oddity("archive extracted into its own folder: RawImage/RawImage", _nest),
    "raw_at_root": Oddity("TrainingData and so on directly at the root", _lift("RawImage")),
    "annotations_at_root": Oddity("400_junior directly at the root", _lift("AnnotationsByMD")),
    "lower_case_folders": Oddity("rawimage/trainingdata", _small_letters),
    "upper_case_bmp": Oddity("001.BMP", _capital_suffix),
    "png_stored": Oddity("001.png", _store_as(".png")),
    "jpg_stored": Oddity("001.jpg", _store_as(".jpg")),
    "tif_stored": Oddity("001.tif", _store_as(".tif")),
    "rgb_stored": Oddity("gray films stored as RGB", _store_as(".bmp", "RGB")),
    "short_names": Oddity("1.bmp and 1.txt instead of 001", _short_names),
    "hidden_files": Oddity("what file managers leave behind", _hidden_files),
    "archives_beside": Oddity("extracted, with the archives kept", _archives_beside),
    "crlf": Oddity("lines end as on Windows", _rewrite_notes(lambda t: t.replace("\n", "\r\n"))),
    "byte_order_mark": Oddity("annotations begin with a mark", _rewrite_notes("\ufeff".__add__)),
    "blank_trailing_lines": Oddity("blank lines at the end", _rewrite_notes("{}\n \n\n".format)),
    "no_trailing_integers": Oddity(
        "19 lines and no more",
        _rewrite_notes(lambda t: "".join(line for line in t.splitlines(True) if "," in line)),
    ),
    "float_points": Oddity(
        "points with decimals", _rewrite_notes(lambda t: t.replace(",", ".5, "))
    ),
    "patients": Oddity("patients.csv with two films a patient", _patients),
    "no_meta": Oddity("no meta.csv, as published", _remove("meta.csv")),
    # spoken of
    "image_size_differs": Oddity(
        "a film of another size", _other_size, "image_size_differs", "warning"
    ),
    "left_facing": Oddity("a film that faces left", _mirror, "left_facing", "warning"),
    "images_elsewhere": Oddity("films in a folder of one's own", _elsewhere, "ignored_images",
                               "warning"),
    "unknown_image": Oddity("patients.csv names a film that is not there",
                            _write("patients.csv", "image,patient\n999,p1\n"), "unknown_image",
                            "warning"),
    "duplicate_of_one_patient": Oddity("one film twice, known by patients.csv",
                                       _duplicate_of_one_patient, "duplicate_image", "warning"),
    # refused
    "archives_only": Oddity("archives, not extracted", _archives_only, "archives_not_extracted"),
    "annotations_packed": Oddity("annotations not extracted", _annotations_packed,
                                 "archives_not_extracted"),
    "missing_annotation": Oddity("a film without the senior's file", _missing_annotation,
                                 "missing_annotation"),
    "missing_reader": Oddity("no file of the junior", _missing_reader, "missing_annotation"),
    "annotation_without_image": Oddity("an annotation without its film", _missing_film,
                                       "annotation_without_image"),
    "empty_image": Oddity("a film of no bytes", _empty_film, "empty_file"),
    "truncated_image": Oddity("half a film", _truncate, "unreadable_image"),
    "empty_annotation": Oddity("an annotation without lines", _rewrite_note(6, lambda _: []),
                               "empty_file"),
    "wrong_point_count": Oddity("18 points", _rewrite_note(7, lambda lines: lines[1:]),
                                "wrong_point_count"),
    "malformed_line": Oddity("a line that is no point",
                             _rewrite_note(8, lambda lines: ["12;34", *lines]), "malformed_line"),
    "point_outside": Oddity("a point outside the film",
                            _rewrite_note(9, lambda lines: ["9999,12", *lines[1:]]),
                            "point_outside"),
    "duplicate_image": Oddity("one film under two numbers", _duplicate, "duplicate_image"),
    "duplicate_case": Oddity("one number in two folders", _number_twice, "duplicate_case"),
    "no_pixel_size": Oddity("nothing says the pixel size",
                            _write("dataset.json", '{"synthetic": true}\n'), "no_pixel_size"),
    "bad_description": Oddity("dataset.json is no JSON", _write("dataset.json", "{"),
                              "bad_table"),
    "bad_patients": Oddity("patients.csv with other columns",
                           _write("patients.csv", "film;person\n001;1\n"), "bad_table"),
    "patient_of_two_folders": Oddity("films of one patient in training and test (challenge)",
                                     _patient_of_two_folders, "group_in_two_splits", "warning"),
}  # fmt: skip
"""By name: everything odd or faulty that the generator can plant, and what a reader must say."""
