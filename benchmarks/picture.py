"""One picture for a newcomer: why windows make γ and β cheap on a label map."""

import numpy as np

from spade_fast import SemanticLayout

from . import layouts

# Light, so that letters can be read on them. The first ones go to the largest regions.
COLOURS = ("#8fc1e3", "#f6c177", "#a3d9a5", "#eb9a94", "#c3aee0", "#f2e394", "#8fd6cf", "#f4b6d2", "#c8b195", "#b5bd6b", "#9fa8da")
UNLABELLED, INK = "#e6e6e6", "#202020"
CLASSES = 182  # of COCO-Stuff; the one after the last is "don't care"
REACH = 2  # what two 3 × 3 convolutions see of a pixel's neighbours, on each side of it
PLACES, APART = 4, 20  # how many places of a window are framed, and how many pixels lie between two frames


def save_picture(path, labels, instances=None, size=256):
    """Draws a label map, four of its windows, and the pixels that are computed, as a PNG (or what the path's ending says).

    Args:
        path: the file.
        labels: integers [height, width], COCO-Stuff's classes 0 to 181, and 255 where nobody put a label.
        instances: integers [height, width], or None.
        size: height and width that both are brought to, 16 or more.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels, instances = layouts.resized(labels, instances, (size, size))
    layout = SemanticLayout.from_labels(labels[None], CLASSES, None if instances is None else instances[None], dont_care=255)
    index = layout.windows((size, size), 3).index[0].numpy()
    colours = code_colours(layout)[layout.codes[0].numpy()]
    windows = choose_windows(index, labels)

    figure = plt.figure(figsize=(9, 3.8), facecolor="white")
    # 512 pixels wide and high, so that each of 256 × 256 is a square of the same size.
    panels = [figure.add_axes((left / 1800, 148 / 760, 512 / 1800, 512 / 760)) for left in (36, 644, 1252)]
    panels[0].imshow(colours, interpolation="nearest")
    frame_places(panels[0], windows)
    show_windows(panels[1], windows, colours)
    first = np.unique(index, return_index=True)[1]
    computed = 0.3 * colours + 0.7
    computed.reshape(-1, 3)[first] = matplotlib.colors.to_rgb(INK)
    panels[2].imshow(computed, interpolation="nearest")

    edges = "" if instances is None else " Darker: edges of instances."
    texts = (
        (f"Labels, {size} × {size}",
         f"γ and β at a pixel depend on nothing but\nthe 5 × 5 labels around it. Some of these\nwindows are framed.{edges}"),
        ("The framed windows, enlarged",
         f"The same window gives the same γ and β,\nwherever it lies: once is enough for the\n{len(windows['A']):,} pixels that see A."),
        ("The pixels that are computed",
         f"One for each distinct window, black here:\n{len(first):,} of {index.size:,}. All the others look\nup what was computed for their window."),
    )
    for panel, (title, text) in zip(panels, texts):
        panel.set(xticks=[], yticks=[])
        panel.set_title(title, fontsize=10, weight="bold", color=INK)
        panel.text(0, -0.03, text, transform=panel.transAxes, va="top", fontsize=8, linespacing=1.3, color=INK)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def code_colours(layout):
    """Red, green and blue of each code, float [P, 3]: a colour for its label, darker where it is an edge of an instance."""
    from matplotlib.colors import to_rgb

    palette = layout.palette.numpy()
    label, edge = palette[:, : CLASSES + 1].argmax(1), palette[:, CLASSES + 1 :].any(1)
    area = np.bincount(label[layout.codes.numpy().ravel()], minlength=CLASSES + 1)
    rank = np.argsort(np.argsort(-area[:CLASSES], kind="stable"))  # the label of the largest region has 0
    names = [UNLABELLED if number == CLASSES else COLOURS[rank[number] % len(COLOURS)] for number in label]
    return np.array([to_rgb(name) for name in names]) * np.where(edge, 0.62, 1)[:, None]


def choose_windows(index, labels):
    """The most frequent window, the two most frequent ones on other borders each, and a rare one.

    Returns a dictionary of letters and of the places that see the window, rows and columns, int [count, 2].
    """
    inside = index[REACH:-REACH, REACH:-REACH]
    numbers, counts = np.unique(inside, return_counts=True)
    numbers = numbers[np.argsort(-counts, kind="stable")]
    chosen, kinds = [numbers[0]], [1]
    for number in numbers[1:]:
        kind = set(around(labels, np.argwhere(inside == number)[0] + REACH).flat)
        if len(chosen) < 3 and len(kind) > 1 and kind not in kinds:
            chosen.append(number)
            kinds.append(kind)
    if numbers[-1] not in chosen:
        chosen.append(numbers[-1])
    return {letter: np.argwhere(inside == number) + REACH for letter, number in zip("ABCD", chosen)}


def around(values, place):
    """What the window of a pixel sees of values [height, width, ...]."""
    row, column = place
    return values[row - REACH : row + REACH + 1, column - REACH : column + REACH + 1]


def frame_places(axes, windows):
    """Frames a few places of each window, with its letter, where there is room: the rarest window's first."""
    from matplotlib.patches import Rectangle

    size = int(axes.get_xlim()[1] + 0.5)
    framed = []
    for letter, places in reversed(windows.items()):
        for number in range(PLACES):
            distances = [np.hypot(*(places - place).T) for place in framed]
            room = np.min([places.min(1), (size - places).min(1), *distances], axis=0)
            if number and room.max() < APART * size / 256:
                break
            row, column = place = places[room.argmax()]
            framed.append(place)
            for colour, width in ("white", 2.4), (INK, 1):
                axes.add_patch(Rectangle((column - REACH - 0.5, row - REACH - 0.5), 2 * REACH + 1, 2 * REACH + 1,
                                         fill=False, edgecolor=colour, linewidth=width))
            axes.annotate(letter, (column + REACH + 0.5, row), (2, 0), textcoords="offset points", va="center", fontsize=8,
                          weight="bold", color=INK)


def show_windows(axes, windows, colours):
    """The windows as large squares, two by two, and how many pixels see each."""
    for number, (letter, places) in enumerate(windows.items()):
        across, down = number % 2 * 1.12, number // 2 * 1.12
        tile = axes.inset_axes((across / 2.0, 0.56 - down / 2, 0.44, 0.44))
        tile.imshow(around(colours, places[0]))
        tile.set(xticks=np.arange(0.5, 4), yticks=np.arange(0.5, 4), xticklabels=[], yticklabels=[])
        tile.grid(color="white", linewidth=1)
        tile.tick_params(length=0)
        tile.set_xlabel(f"{letter}: {len(places):,} pixel{'s'[: len(places) - 1]}", fontsize=8, color=INK, labelpad=2)
    axes.axis("off")
