"use strict";
// Beside MLflow's own page, 3.17: experiments of ablab open on their runs, as their saved view shows them.
// Each setting is MLflow's own, in the browser, and only where the reader has not chosen yet.
(() => {
  const firstChoices = {
    "mlflow.workflowType_v1": "machine_learning", // else experiments open on an empty page of traces
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": true, // the assistant takes a third of the width, unasked
  };
  for (const [key, value] of Object.entries(firstChoices)) {
    if (localStorage.getItem(key) === null) localStorage.setItem(key, JSON.stringify(value));
  }

  // A link to an experiment without more: #/experiments/7, #/experiments/7/runs?workflowType=machine_learning
  const BARE = /#\/experiments\/(\d+)(?:\/runs)?\/?(?:\?workflowType=machine_learning)?$/;
  const VIEW = "mlflow.sharedViewState.arms";

  async function viewOf(id) {
    // Asked anew each time: an experiment may have come since the page was opened.
    const answer = await fetch(`ajax-api/2.0/mlflow/experiments/get?experiment_id=${id}`);
    const { name, tags = [] } = (await answer.json()).experiment;
    if (!tags.some((tag) => tag.key === VIEW)) return null;
    const charts = name.endsWith("@study") ? "&compareRunsMode=CHART" : "";
    return `#/experiments/${id}/runs?workflowType=machine_learning&viewStateShareKey=arms${charts}`;
  }

  document.addEventListener("click", async (event) => {
    const link = event.target.closest?.("a[href]");
    const found = link && BARE.exec(link.getAttribute("href"));
    const plain = event.button === 0 && !(event.metaKey || event.ctrlKey || event.shiftKey || event.altKey);
    if (!found || !plain || localStorage.getItem("mlflow.workflowType_v1") !== '"machine_learning"') return;
    event.preventDefault();
    event.stopPropagation();
    let view = null;
    try {
      view = await viewOf(found[1]);
    } catch { /* then MLflow's own page of it */ }
    location.hash = view ?? link.getAttribute("href");
  }, true);
})();
