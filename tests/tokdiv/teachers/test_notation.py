"""The SPEC notation: what each form means, which text is a path, and what a mistake is told."""

import dataclasses
from pathlib import Path

import pytest

from tokdiv.errors import UsageError
from tokdiv.teachers.notation import parse_specs
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.zoo import GROUPS, ZOO


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that relative paths are ours."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(path: str | Path) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(b"weights")
    return Path(path).resolve()


def one(text: str) -> TeacherSpec:
    specs = parse_specs([text])
    assert len(specs) == 1
    return specs[0]


def mistake(*texts: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_specs(texts)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The forms


def test_a_zoo_name_is_the_zoo_s_own_entry():
    assert one("dino_resnet50") == ZOO["dino_resnet50"]


def test_the_paper_group_is_the_paper_s_four_teachers_in_order():
    names = [spec.name for spec in parse_specs(["paper"])]
    assert names == ["mae_vit_base", "mae_vit_large", "dino_vit_base", "dino_resnet50"]
    assert GROUPS["paper"] == tuple(names)


def test_timm_model_is_timm_s_own_weights():
    spec = one("timm:vit_base_patch16_224.dino")
    assert (spec.architecture, spec.weights) == ("vit_base_patch16_224.dino", "timm")
    assert spec.name == "timm:vit_base_patch16_224.dino"
    assert not spec.baseline


def test_random_weights_are_a_baseline():
    spec = one("timm:resnet18@random")
    assert (spec.architecture, spec.weights, spec.baseline) == ("resnet18", "random", True)
    assert spec.name == "timm:resnet18@random"


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors", "deep/er/w.pth"])
def test_a_local_checkpoint_is_recorded_by_its_absolute_path(name: str):
    path = touch(name)
    spec = one(f"timm:resnet18@{name}")
    assert (spec.architecture, spec.weights) == ("resnet18", str(path))
    assert spec.name == f"timm:resnet18@{path.name}"
    assert not spec.baseline


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, folder: Path):
    monkeypatch.setenv("HOME", str(folder))
    assert one(f"timm:resnet18@~/{touch('w.pth').name}").weights == str(folder / "w.pth")


def test_the_contract_s_example_is_read_as_written():
    path = touch("w.safetensors")
    spec = one("bird=timm:mobilenetv2_100@w.safetensors:pad_type=same:mean=0.5:std=0.5")
    assert spec == TeacherSpec(
        name="bird",
        architecture="mobilenetv2_100",
        weights=str(path),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        arguments={"pad_type": "same"},
    )


# Weights on a server, on the hub, and under an older name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("https://example.org/a/w.pth", "w.pth"),
        ("https://example.org:8080/a/w.pth", "w.pth"),
        ("http://localhost:1/w.safetensors?download=true", "w.safetensors?download=true"),
        ("hf-hub:owner/repo", "repo"),
        ("hf-hub:owner/repo@v1", "repo@v1"),
    ],
)
def test_an_architecture_takes_weights_from_elsewhere(source: str, name: str):
    spec = one(f"timm:resnet18@{source}")
    assert (spec.architecture, spec.weights) == ("resnet18", source)
    assert spec.name == f"timm:resnet18@{name}"
    spec = one(f"mine=timm:resnet18@{source}:size=64:weights=raw")
    assert (spec.name, spec.weights, spec.size, spec.use_ema) == ("mine", source, 64, False)
    assert [s.weights for s in parse_specs([f"pixels,timm:resnet18@{source},hog"])] == [
        None,
        source,
        None,
    ]


def test_a_repository_of_the_hub_is_its_own_architecture_until_it_is_loaded():
    spec = one("hf-hub:timm/resnet18.a1_in1k:size=64:mean=0.5")
    assert spec.architecture == spec.weights == "hf-hub:timm/resnet18.a1_in1k"
    assert (spec.size, spec.mean) == (64, (0.5, 0.5, 0.5))


# Labels


def test_a_label_replaces_the_name_and_nothing_else():
    labeled = one("mine=dino_resnet50")
    assert labeled == dataclasses.replace(ZOO["dino_resnet50"], name="mine")


def test_blanks_around_a_spec_and_its_label_are_ignored():
    assert one("  my net = dino_resnet50 ").name == "my net"


def test_without_a_label_the_options_are_part_of_the_name():
    names = [s.name for s in parse_specs(["dino_vit_base", "dino_vit_base:blocks=9"])]
    assert names == ["dino_vit_base", "dino_vit_base:blocks=9"]


def test_options_of_a_group_go_to_each_member():
    specs = parse_specs(["paper:size=448"])
    assert [s.size for s in specs] == [448] * 4
    assert specs[0].name == "mae_vit_base:size=448"


def test_a_label_given_twice_is_a_mistake():
    assert mistake("a=pixels", "a=hog") == (
        "the label 'a' names 2 teachers: labels must be unique; write LABEL=SPEC to name one"
    )
    assert "'mae_vit_base' names 2" in mistake("paper", "mae_vit_base")


def test_two_checkpoints_of_one_base_name_need_labels():
    touch("a/w.pth"), touch("b/w.pth")
    assert "labels must be unique" in mistake("timm:resnet18@a/w.pth", "timm:resnet18@b/w.pth")
    assert len(parse_specs(["a=timm:resnet18@a/w.pth", "b=timm:resnet18@b/w.pth"])) == 2


def test_a_label_cannot_name_a_group():
    assert mistake("ours=paper") == "the label 'ours' cannot name the 4 teachers of 'paper'"


# Comma-separated lists


def test_a_comma_separated_list_is_as_many_options():
    assert parse_specs(["pixels,a=hog:size=64,timm:resnet18@random"]) == parse_specs(
        ["pixels", "a=hog:size=64", "timm:resnet18@random"]
    )


def test_members_of_a_list_may_have_the_same_option():
    assert [s.size for s in parse_specs(["pixels:size=64,hog:size=32"])] == [64, 32]


def test_empty_places_in_a_list_are_skipped():
    assert [s.name for s in parse_specs(["pixels, ,hog,"])] == ["pixels", "hog"]


def test_a_list_longer_than_any_file_name_is_read():
    names = [f"label{n}=pixels" for n in range(60)]
    assert [s.name for s in parse_specs([",".join(names)])] == [f"label{n}" for n in range(60)]


def test_a_list_of_nothing_is_a_mistake():
    assert mistake(" , ").startswith("no teacher given: name one with -t")
    assert mistake().startswith("no teacher given")


# Options


def test_every_option_sets_its_field():
    spec = one("dino_vit_base:blocks=9:norm=true:size=448:mean=0.48/0.46/0.41:std=.2:seed=3")
    assert (spec.block, spec.norm, spec.size, spec.seed) == (9, True, 448, 3)
    assert spec.mean == (0.48, 0.46, 0.41)
    assert spec.std == (0.2, 0.2, 0.2)
    assert spec.arguments == {}


def test_an_intermediate_block_has_no_final_norm_unless_asked_for():
    assert ZOO["dino_vit_base"].norm is True
    assert one("dino_vit_base:blocks=9").norm is False
    assert one("dino_vit_base:norm=true:blocks=9").norm is True
    assert one("dino_vit_base:norm=false").norm is False


def test_other_keys_are_arguments_of_the_architecture_with_plain_types():
    spec = one(
        "timm:a@random:pad_type=same:drop=0.5:depth=2:flag=true:off=False:nil=none:low=1e-3:neg=-1"
    )
    assert spec.arguments == {
        "pad_type": "same",
        "drop": 0.5,
        "depth": 2,
        "flag": True,
        "off": False,
        "nil": None,
        "low": 1e-3,
        "neg": -1,
    }
    assert type(spec.arguments["depth"]) is int


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("blocks=-1", "block = -1: expected a whole number from 0 to"),
        ("blocks=last", "block = 'last': expected a whole number from 0 to"),
        ("size=0", "size = 0: expected a whole number from 1 to"),
        ("size=2.5", "size = 2.5: expected a whole number from 1 to"),
        ("norm=yes", "norm = 'yes': expected true or false"),
        ("mean=gray", "mean = 'gray': expected one number or three (R, G, B)"),
        ("mean=0.5/0.5", "expected one number or three (R, G, B)"),
        ("mean=nan", "expected one number or three (R, G, B)"),
        ("std=0", "expected positive numbers"),
        ("std=0.2/-1/0.2", "expected positive numbers"),
        ("size=64:size=32", "the option 'size' is given twice in 'dino_vit_base:size=64:size=32'"),
    ],
)
def test_a_mistaken_option_is_named_with_what_was_expected(option: str, said: str):
    assert said in mistake(f"dino_vit_base:{option}")


def test_pixels_and_hog_refuse_what_they_cannot_use():
    assert "takes size, mean and std, not 'blocks'" in mistake("pixels:blocks=2")
    assert one("hog:size=64:mean=0.5:std=0.5").size == 64


# Paths that look like options: where the text before an option is an existing path, the path wins


@pytest.mark.parametrize(
    "name",
    ["a:b=c.pth", "x=y.pth", "a,b.pth", "a@b.pth", "d:k=v/e,f=g@h/w:size=9.pth", "sp ace.pth"],
)
def test_an_existing_path_wins_whatever_it_contains(name: str):
    path = touch(name)
    assert one(f"timm:resnet18@{name}").weights == str(path)
    spec = one(f"mine=timm:resnet18@{name}:size=64")
    assert (spec.name, spec.weights, spec.size) == ("mine", str(path), 64)
    specs = parse_specs([f"pixels,timm:resnet18@{name}:size=64,hog"])
    assert [s.weights for s in specs] == [None, str(path), None]
    assert [s.size for s in specs] == [None, 64, None]


def test_an_option_is_an_option_where_no_such_path_exists():
    touch("w.pth")
    assert one("timm:resnet18@w.pth:size=64").size == 64
    touch("w.pth:size=64")
    assert one("timm:resnet18@w.pth:size=64").weights == str(Path("w.pth:size=64").resolve())


def test_two_paths_with_commas_in_one_list():
    first, second = touch("a,b/w.pth"), touch("c,d.pth")
    specs = parse_specs([f"timm:resnet18@{first},timm:resnet18@c,d.pth"])
    assert [s.weights for s in specs] == [str(first), str(second)]


def test_a_toml_file_whose_name_has_an_equals_sign():
    Path("my=list,of:x=1.toml").write_text('[[teachers]]\nzoo = "pixels"\n')
    assert one("my=list,of:x=1.toml").name == "pixels"
    assert one("p=my=list,of:x=1.toml").name == "p"


# TOML files


def write(text: str, name: str = "teachers.toml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def test_a_toml_file_states_every_field():
    path = touch("sub/w:size=1,2.pth")
    spec = one(
        write(
            """
            [[teachers]]
            name = "full"
            architecture = "vit_tiny_patch16_224"
            weights = "w:size=1,2.pth"
            sha256 = "ab12"
            mean = [0.1, 0.2, 0.3]
            std = 0.5
            interpolation = "bilinear"
            input_size = 256
            size = 64
            block = 3
            norm = true
            seed = 4
            baseline = true
            method = "ours"
            license = "mit"
            paper = "arXiv:0"
            [teachers.arguments]
            depth = 4
            """,
            "sub/full.toml",
        )
    )
    assert spec == TeacherSpec(
        name="full",
        architecture="vit_tiny_patch16_224",
        weights=str(path),
        sha256="ab12",
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.5, 0.5),
        interpolation="bilinear",
        input_size=256,
        size=64,
        block=3,
        norm=True,
        seed=4,
        baseline=True,
        method="ours",
        license="mit",
        paper="arXiv:0",
        arguments={"depth": 4},
    )


def test_a_toml_file_lists_several_and_starts_from_the_zoo():
    specs = parse_specs(
        [
            write(
                """
                [[teachers]]
                zoo = "mae_vit_base"
                size = 448
                [[teachers]]
                zoo = "mae_vit_base"
                name = "nine"
                block = 9
                [[teachers]]
                name = "own"
                architecture = "resnet18"
                [[teachers]]
                name = "untrained"
                architecture = "resnet18"
                weights = "random"
                [[teachers]]
                name = "remote"
                architecture = "resnet18"
                weights = "https://example.org/w.pth"
                [[teachers]]
                name = "raw"
                architecture = "pixels"
                """
            )
        ]
    )
    first, nine, own, untrained, remote, raw = specs
    assert first == dataclasses.replace(ZOO["mae_vit_base"], size=448)
    assert (nine.name, nine.block, nine.norm) == ("nine", 9, False)
    assert own.weights == "timm"
    assert untrained.baseline and raw.baseline and not own.baseline
    assert remote.weights == "https://example.org/w.pth"
    assert raw.weights is None


def test_a_toml_file_takes_labels_and_options_like_any_spec():
    path = write('[[teachers]]\nzoo = "dino_vit_base"\n')
    assert one(f"mine={path}:size=64").size == 64
    assert one(f"mine={path}:size=64").name == "mine"
    two = write('[[teachers]]\nzoo = "pixels"\n[[teachers]]\nzoo = "hog"\n', "two.toml")
    assert "cannot name the 2 teachers" in mistake(f"mine={two}")


ENTRY = '[[teachers]]\nname = "a"\narchitecture = "resnet18"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold one or more [[teachers]] tables and nothing else"),
        ("teachers = [1, 2]", "must hold one or more [[teachers]] tables"),
        ("teachers = 'a'", "must hold one or more [[teachers]] tables"),
        (ENTRY + "[other]\nx = 1", "and nothing else"),
        ("[[teachers]\n", "is not valid TOML"),
        ('[[teachers]]\narchitecture = "resnet18"', "the field 'name' is missing"),
        ('[[teachers]]\nname = "a"', "the field 'architecture' is missing"),
        (ENTRY + "sizes = 64", "unknown field 'sizes' of a teacher (did you mean size"),
        (ENTRY + 'size = "64"', "size = '64': expected a whole number from 1 to"),
        (ENTRY + "size = true", "size = True: expected a whole number"),
        (ENTRY + "size = 0", "size = 0: expected a whole number from 1 to"),
        (ENTRY + "block = -1", "block = -1: expected a whole number from 0 to"),
        (ENTRY + "norm = 1", "norm = 1: expected true or false"),
        (ENTRY + "mean = [0.5, 0.5]", "expected one number or three (R, G, B)"),
        (ENTRY + 'mean = "gray"', "expected one number or three (R, G, B)"),
        (ENTRY + "std = 0", "expected positive numbers"),
        (ENTRY + "weights = 5", "weights = 5: expected a text"),
        (ENTRY + "sha256 = 5", "sha256 = 5: expected a text"),
        (ENTRY + "arguments = 5", "arguments = 5: expected a table of key = value"),
        (ENTRY + 'weights = "gone.pth"', "the weights 'gone.pth' of 'a': no such file"),
        (
            '[[teachers]]\nzoo = "mae_vit_bas"',
            "unknown zoo entry 'mae_vit_bas' (did you mean mae_vit_base",
        ),
        ("[[teachers]]\nzoo = [1]", "unknown zoo entry '[1]'"),
    ],
)
def test_a_mistake_in_a_toml_file_is_named(text: str, said: str):
    assert said in mistake(write(text))


def test_a_missing_toml_file_is_named():
    assert mistake("gone.toml") == (
        "'gone.toml': no such file; expected a TOML file that lists teachers"
    )


def test_a_deeply_nested_toml_file_is_a_mistake():
    assert "is not valid TOML" in mistake(write("teachers = " + "[" * 100_000))
    assert "is not valid TOML" in mistake(write("a = {b = " * 10_000))


def test_control_characters_in_a_toml_file_s_label_are_a_mistake():
    text = '[[teachers]]\nname = "a\\u0007b"\narchitecture = "resnet18"\n'
    assert r"name = 'a\x07b' of a teacher: expected a text that can be printed" in mistake(
        write(text)
    )


def test_a_toml_file_that_is_no_text_is_a_mistake():
    Path("raw.toml").write_bytes(b"\xff\xfe\x00")
    assert "is not valid TOML" in mistake("raw.toml")


# Mistakes


def test_an_unknown_teacher_is_told_the_nearest_names():
    message = mistake("dino_resnet5")
    assert message.startswith("unknown teacher 'dino_resnet5' (did you mean dino_resnet50")
    assert message.endswith("see them with: tokdiv teachers")


def test_an_unknown_teacher_like_nothing_gets_no_suggestion():
    assert mistake("zzzzqqqq") == "unknown teacher 'zzzzqqqq'; see them with: tokdiv teachers"


def test_a_checkpoint_without_its_architecture_is_told_how_to_write_it():
    touch("w.pth")
    assert mistake("w.pth").endswith("for a local checkpoint write timm:ARCH@w.pth")


@pytest.mark.parametrize("text", ["timm:", "timm:@w.pth", "timm:resnet18@", "timm::size=64"])
def test_half_a_timm_spec_is_incomplete(text: str):
    assert "is incomplete: expected timm:MODEL, timm:ARCH@PATH or timm:ARCH@random" in mistake(text)


def test_a_label_without_a_teacher_is_a_mistake():
    assert "names no teacher" in mistake("mine=")


def test_a_missing_checkpoint_and_a_folder_are_told_apart():
    Path("folder").mkdir()
    assert "no such file; expected a .pth, .pt or .safetensors" in mistake("timm:resnet18@gone.pth")
    assert "a folder, not a checkpoint" in mistake("timm:resnet18@folder")
    assert "no such file" in mistake("timm:resnet18@~nobody-of-this-name/w.pth")
    assert "no such file" in mistake("timm:resnet18@" + "x" * 5000)
