from tests.api.desk import Desk
def test_smoke(desk: Desk):
    print(desk.client.get("/readyz").text)
    job = desk.submit()
    print(job)
    r = desk.client.get(f"/v1/jobs/{job['id']}")
    print(r.status_code, r.headers, r.text)
    desk.client.post(f"/v1/jobs/{job['id']}/cancel")
    for p in ("/v1/stages","/v1/targets","/v1/workers","/v1/version","/healthz",f"/v1/jobs/{job['id']}/events", f"/v1/jobs/{job['id']}/logs", f"/v1/jobs/{job['id']}/artifacts", f"/v1/jobs/{job['id']}/report", "/v1/jobs"):
        print(p, desk.client.get(p).text[:300])
    print(desk.client.get(f"/v1/jobs/{job['id']}/events", headers={"Accept":"text/event-stream"}).text)
    print(desk.client.post("/v1/jobs/validate", json=desk.order()).text)
