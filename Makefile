# make run   set up .venv, rank and pretrain on the images that ship with the project
# make test  the test suite          make lint  ruff and mypy          make bench  the benchmarks
# make docs  build the documentation into site/
PYTHON ?= python3
BIN := .venv/bin
SAMPLES := tokdiv/samples/images
OUT := runs/sample

.PHONY: run test lint bench docs clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

.venv/installed-bench: .venv/installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

run: .venv/installed
	$(BIN)/tokdiv rank $(SAMPLES) -t sample -t pixels,hog -o $(OUT)/ranking
	$(BIN)/tokdiv maps $(SAMPLES)/astronaut_face.jpg $(SAMPLES)/cat_portrait.jpg -t sample -t pixels,hog \
		-o $(OUT)/maps.png
	$(BIN)/img2vec pretrain $(SAMPLES) --teacher $(OUT)/ranking --preset sample --max-steps 10 -o $(OUT)/pretrain
	$(BIN)/python -c "import timm; student = timm.create_model('local-dir:$(OUT)/pretrain/student', pretrained=True); \
		print(f'timm loads the student: {student.num_features} features a token')"
	@echo "ranking: $(OUT)/ranking/ranking.csv"
	@echo "report:  $(OUT)/ranking/report.html"
	@echo "maps:    $(OUT)/maps.png"
	@echo "student: $(OUT)/pretrain/student"

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/installed-bench
	$(BIN)/python benchmarks/bench.py

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv runs site build dist *.egg-info
