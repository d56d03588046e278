"""The plan as an HTML page: well-formed, complete, escaped, self-contained, its bars to scale."""

import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from nam56r import cli
from nam56r.kernels.registry import DEVICES
from nam56r.memory import estimate
from nam56r.parameters import FAMILY
from nam56r.plan import PlanRefused, make_plan
from nam56r.recipe import PRESETS
from nam56r.report.page import render
from tests.nam56r.recipes import recipes

TINY, NAM56R = PRESETS["nam56r-tiny"], PRESETS["nam56r"]
VOID = {"meta", "link"}


class Element:
    """One element: its children are elements and texts."""

    def __init__(self, name, attributes, parent):
        self.name, self.attributes, self.parent, self.children = name, attributes, parent, []

    def __getitem__(self, attribute):
        return self.attributes.get(attribute) or ""

    @property
    def classes(self):
        return self["class"].split()

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, name=None, of=None):
        """Every element below of a name, of a class, in order."""
        for child in self.children:
            if isinstance(child, Element):
                if name in (None, child.name) and (of is None or of in child.classes):
                    yield child
                yield from child.all(name, of)


class Page(HTMLParser):
    """The tree of a page; a tag that closes what isn't open is an error."""

    def __init__(self, text):
        super().__init__()
        self.root = self.open = Element("", {}, None)
        self.feed(text)
        self.close()
        assert self.open is self.root, f"{self.open.name} is never closed"

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes)
        element = Element(name, dict(attributes), self.open)
        self.open.children.append(element)
        if name not in VOID:
            self.open = element

    def handle_endtag(self, name):
        assert name == self.open.name
        self.open = self.open.parent

    def handle_data(self, data):
        self.open.children.append(data)


def planned(recipe, device="h200", **options):
    try:
        return make_plan(recipe, DEVICES[device], **options)
    except PlanRefused as refused:
        return refused.plan


def paged(plan, recipe):
    return Page(render(plan, recipe, DEVICES[plan.device])).root


def every_slot(page):
    return [item for item in page.all("li") if "slot" in item.classes]


def tables(page):
    """name of the section -> its table."""
    found = {}
    for section in page.all("section"):
        for table in section.all("table"):
            found[next(section.all("h2")).text] = table
    return found


def numbers(row):
    return [float(data["value"]) for data in row.all("data")]


def body(table):
    return list(next(table.all("tbody")).all("tr"))


CASES = [(name, device) for name in PRESETS for device in ("cpu", "h200")]


@pytest.mark.parametrize(("name", "device"), CASES)
def test_every_slot_is_there_in_order_with_its_family_and_what_runs(name, device):
    recipe = PRESETS[name]
    plan = planned(recipe, device)
    page = paged(plan, recipe)
    items = every_slot(page)
    assert len(items) == recipe.depth + recipe.mtp.num_depths + 1
    refused = {refusal.layer: refusal for refusal in plan.refusals}
    for slot, item in zip(plan.slots, items, strict=False):
        texts = {kind: "".join(span.text for span in item.all("span", kind)) for kind in ("symbol", "number", "mark")}
        assert (texts["symbol"], texts["number"]) == (slot.symbol, str(slot.layer))
        assert FAMILY[slot.role] in item.classes and ("sparse" in item.classes) == (slot.role == "dsa")
        assert ("refused" in item.classes) == (texts["mark"] == "✕") == (slot.layer in refused)
    parts = [*plan.slots, *plan.mtp, plan.head]
    assert [item.classes[1] for item in items[recipe.depth :]] == ["mtp"] * recipe.mtp.num_depths + ["head"]
    for part, item in zip(parts, items, strict=True):
        (link,) = item.all("a")
        (about,) = item.all("div", "about")
        assert link["aria-describedby"] == about["id"]
        entries = {entry.children[0].text: entry.children[1].text for entry in next(about.all("dl")).children}
        assert link["title"] == "\n".join(f"{term}: {what}" for term, what in entries.items())
        assert part.shapes.keys() <= entries.keys()
        for operator, kernel in part.kernels.items():
            assert entries[operator] == f"{kernel} ({part.reasons[operator]})"
        if slot_of(part):
            assert entries[f"layer {part.layer}"].startswith(f"{part.symbol}, ")
            assert all(feature in entries["features"] for feature in part.features)
            assert ("seam" in entries) == bool(part.seams)


def slot_of(part):
    return hasattr(part, "layer")


def test_rows_have_one_period_or_one_pipeline_segment():
    def rows(recipe):
        lists = [ol for ol in paged(planned(recipe, "cpu"), recipe).all("ol", "row")]
        return ["".join(span.text for span in row.all("span", "symbol")) for row in lists]

    assert rows(NAM56R) == ["AEMEAEMEAEMR"] * 4 + ["AEME", "+-+-→"]
    assert rows(TINY.with_overrides(["pattern=AEMEA|EMEAE|MR"])) == ["AEMEA", "EMEAE", "MR", "+-→"]
    assert rows(TINY.with_overrides(["pattern=AE"])) == ["AE" * 6, "+-→"]
    long = rows(NAM56R.with_overrides([f"pattern={NAM56R.layers.layers}"]))
    assert "".join(long) == NAM56R.layers.layers + "+-+-→" and max(map(len, long)) == 12


def test_every_refusal_is_listed_with_its_reasons():
    recipe = NAM56R.with_overrides(["features.mod=[2, 3]", "features.ngram_hash=[]", "ffn_hidden_size=21503"])
    plan = planned(recipe, "a100", tensor_parallel=2)
    page = paged(plan, recipe)
    assert {refusal.operator for refusal in plan.refusals} >= {"mod", "ngram_hash", "mlp", "index_top_k"}
    (listed,) = page.all("ul", "refusals")
    entries = {item.children[0].text: [li.text for li in item.all("li")] for item in listed.children}
    for refusal in plan.refusals:
        (reasons,) = {
            tuple(reasons)
            for heading, reasons in entries.items()
            if heading.startswith(f"{refusal.operator} at ")
            and str(refusal.layer)
            in heading.partition(" at ")[2].removeprefix("layer").removeprefix("s").strip().split(", ")
        } & {refusal.reasons}
        assert reasons
    titles = {item["title"] for item in page.all("a")}
    for refusal in plan.refusals:
        if refusal.layer != "model":
            told = [title for title in titles if "; ".join(refusal.reasons) in title]
            assert told, refusal
    assert "✕ refused" in " ".join(titles)


@pytest.mark.parametrize(("name", "device"), CASES)
def test_bars_are_to_scale_and_add_up(name, device):
    recipe = PRESETS[name]
    plan = planned(recipe, device, micro_batch=2)
    shown = tables(paged(plan, recipe))
    forward, backward, both = numbers(next(shown["FLOPs a token"].all("tfoot")))
    assert (forward, backward) == pytest.approx(tuple(plan.flops_per_token[way] for way in ("forward", "backward")))
    assert both == pytest.approx(forward + backward)

    estimated = estimate(recipe, plan)
    memory = shown["Memory of one device, estimated"]
    held, activations, other, total = numbers(next(memory.all("tfoot")))
    assert held == estimated.weights + estimated.gradients + estimated.optimizer
    assert activations == sum(estimated.activations.values())
    assert other == estimated.logits + estimated.workspace + estimated.runtime
    assert total == estimated.total

    for table in shown.values():
        rows = body(table)
        most = max(numbers(row)[-1] for row in rows)
        for row in rows:
            *given, whole = numbers(row)
            assert sum(given) == pytest.approx(whole)
            widths = [float(re.fullmatch(r"width:(.+)%", part["style"])[1]) for part in row.all("span", "part")]
            wanted = [100 * number / most for number in given if number]
            assert widths == pytest.approx(wanted, abs=1e-3)
        sums = [sum(column) for column in zip(*map(numbers, rows), strict=True)]
        assert sums == pytest.approx(numbers(next(table.all("tfoot"))))


@pytest.mark.parametrize(("name", "device"), CASES)
def test_the_page_fetches_nothing_and_its_links_have_targets(name, device):
    text = render(planned(PRESETS[name], device), PRESETS[name], DEVICES[device])
    page = Page(text).root
    assert not list(page.all("script")) and "http:" not in text and "https:" not in text and "url(" not in text
    identifiers = [element["id"] for element in page.all() if element["id"]]
    assert len(identifiers) == len(set(identifiers))
    for element in page.all():
        assert not element.attributes.keys() & {"src", "srcset", "onclick", "onload", "onerror"}
        href = element["href"]
        assert href in ("", "data:,") or href.removeprefix("#") in identifiers
    headings = [int(element.name[1]) for element in page.all() if re.fullmatch("h[1-6]", element.name)]
    assert headings.count(1) == 1 and headings[0] == 1
    assert all(next_ - one <= 1 for one, next_ in zip(headings, headings[1:]))


HOSTILE = [
    "<script>alert(1)</script>",
    "\"' onmouseover=alert(1) x='",
    "</title></style><img src=x>",
    "&amp;&#60;b&#62;",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name):
    recipe = TINY.model_copy(update={"name": name, "features": {name: (1,)}})
    plan = planned(recipe, "cpu", dtype=torch.float32)
    page = paged(plan, recipe)
    assert next(page.all("h1")).text == f"{name} on cpu: refused"
    assert next(page.all("title")).text == f"{name} on cpu: refused"
    assert any(name in heading.text for heading in page.all("h3"))
    plain = Page(render(planned(TINY, "cpu"), TINY, DEVICES["cpu"])).root
    assert {element.name for element in page.all()} == {element.name for element in plain.all()}
    allowed = {attribute for element in plain.all() for attribute in element.attributes}
    assert {attribute for element in page.all() for attribute in element.attributes} <= allowed


@settings(max_examples=60, deadline=None)
@given(recipes(), st.sampled_from(["cpu", "a100", "h200"]), st.sampled_from([1, 2, 3]))
def test_any_plan_has_a_page(recipe, device, tensor_parallel):
    plan = planned(recipe, device, tensor_parallel=tensor_parallel)
    page = paged(plan, recipe)
    layers = ["".join(span.text for span in item.all("span", "number")) for item in every_slot(page)]
    assert layers[: recipe.depth] == [str(number) for number in range(1, recipe.depth + 1)]
    total = numbers(next(tables(page)["Memory of one device, estimated"].all("tfoot")))[-1]
    assert total == estimate(recipe, plan).total


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="nam56r")


@pytest.mark.parametrize(("name", "device", "code"), [("nam56r-tiny", "cpu", 0), ("nam56r", "a100", 3)])
def test_the_command_writes_the_page_beside_the_table(tmp_path, name, device, code):
    path = tmp_path / "plan.html"
    command = ["plan", "--recipe", name, "--device", device]
    result = call(*command, "--html", path)
    assert result.exit_code == code
    assert result.stdout == call(*command).stdout
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    assert path.read_text(encoding="utf-8") == render(
        planned(PRESETS[name], device, dtype=dtype), PRESETS[name], DEVICES[device]
    )


@pytest.mark.parametrize("where", ["missing/plan.html", "."])
def test_a_path_that_takes_no_file_is_one_line(tmp_path, where):
    result = call("plan", "--recipe", "nam56r-tiny", "--device", "cpu", "--html", tmp_path / where)
    assert result.exit_code == 2 and not result.stdout
    line, rest = result.stderr.split("\n", 1)
    assert line.startswith(f"nam56r: {tmp_path / where}: ") and not rest
